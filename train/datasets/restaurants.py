"""Restaurants described by rule: a data-to-text task in the form of E2E that needs no download."""

from itertools import product

import tensorflow_datasets as tfds

from train.datasets.builder import Builder
from train.datasets.splits import bucket

_NAMES = ("Blue Spice", "The Mill", "Cotto", "The Eagle", "Giraffe", "Zizzi", "The Vaults", "Aromi")
_FOODS = ("French", "Italian", "Chinese", "Indian", "English", "Japanese")
_AREAS = ("riverside", "city centre", "")  # "": not said
_FRIENDLY = ("yes", "no", "")


def meaning(name: str, food: str, area: str, friendly: str) -> str:
    """ "name[Cotto], food[French], area[riverside]"; what is "" is left out."""
    values = {"name": name, "food": food, "area": area, "familyFriendly": friendly}
    return ", ".join(f"{field}[{value}]" for field, value in values.items() if value)


def references(name: str, food: str, area: str, friendly: str) -> list[str]:
    """Three sentences that say this."""
    where = {"riverside": " by the river", "city centre": " in the city centre"}.get(area, "")
    there = f"{where.strip().capitalize()}, there" if where else "There"
    kind = {"yes": "a family friendly", "no": "an adults only"}.get(friendly, "a")
    children = {"yes": "welcomes children", "no": "is not for children"}.get(friendly, "")
    return [
        f"{name} is {'an' if food[0] in 'EI' else 'a'} {food} restaurant{where}"
        f"{f' that {children}' if children else ''}.",
        f"{there} is {kind} place called {name} that serves {food} food.",
        f"{name} serves {food} food{where}.{f' It {children}.' if children else ''}",
    ]


class Restaurants(Builder):
    """432 restaurants as lists of attributes, with three sentences for each. Made by rule.

    About 10 % each are for validation and test, chosen by hash of the attributes. It shows that a
    data-to-text model trains; a figure on it says nothing about language.
    Source: this file. Licence: that of this project.
    """

    VERSION = tfds.core.Version("1.0.0")

    def features(self):
        return {"meaning_representation": tfds.features.Text(), "reference": tfds.features.Text()}

    def examples(self):
        splits = {"train": [], "validation": [], "test": []}
        for values in product(_NAMES, _FOODS, _AREAS, _FRIENDLY):
            said = meaning(*values)
            split = {8: "validation", 9: "test"}.get(bucket(said, 10), "train")
            for index, reference in enumerate(references(*values)):
                row = {"meaning_representation": said, "reference": reference}
                splits[split].append((f"{said} {index}", row))
        return splits
