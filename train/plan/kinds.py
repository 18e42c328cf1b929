"""Kinds of equations, by what a compiler does with them."""

# the result has another name, no other memory
SAME = frozenset(
    {"reshape", "squeeze", "expand_dims", "stop_gradient", "sharding_constraint", "reshard"}
    | {"copy", "optimization_barrier"}
)

# computed where they are used, and not written to memory if that can be helped
ELEMENTWISE = frozenset(
    {"abs", "add", "add_any", "and", "bitcast_convert_type", "ceil", "clamp", "copy", "eq", "floor"}
    | {"convert_element_type", "ge", "gt", "integer_pow", "is_finite", "le", "lt", "max", "min"}
    | {"mul", "ne", "neg", "not", "or", "reduce_precision", "reshard", "round", "select_n"}
    | {"shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "square"}
    | {"stop_gradient", "sub", "xor"}
)
# too dear to be computed for every use
DEAR = frozenset(
    {"atan2", "cbrt", "cos", "cosh", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1"}
    | {"log", "log1p", "logistic", "pow", "rem", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh"}
)
ELEMENTWISE |= DEAR
MOVES = frozenset(
    {"broadcast_in_dim", "concatenate", "dynamic_slice", "iota", "pad", "rev", "slice"}
    | {"transpose", "layout_copy"}
)
FUSED = ELEMENTWISE | MOVES

REDUCTIONS = frozenset(
    {"argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod"}
    | {"reduce_sum"}
)
# may write over an operand that nobody reads any more
IN_PLACE = ELEMENTWISE | {"dynamic_update_slice", "scatter-add", "scan"}
