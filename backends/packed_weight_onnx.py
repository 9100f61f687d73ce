"""What the functions of packed layers share: where each packed block stands in the dense weight."""

# The block row of a packed block is the number of row pointers, the first one left out, that are not above its place:
# no two are equal, since each block row has a block. The weight's shape is an attribute, so that a runtime can fold the
# weight to a constant and TensorRT's parser knows its sizes.
PLACES = """
    shape = Constant <value_ints: ints = @weight_shape> ()
    one = Constant <value_ints = [1]> ()
    zero = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [9]> ()
    outputs = Slice (shape, zero, one)
    tail = Slice (shape, one, end)
    minus_one = Constant <value_ints = [-1]> ()
    first = Constant <value_int = 0> ()
    block = Shape <start = 1, end = 2> (values)
    count = Shape (columns)
    pointers = Shape (row_pointers)
    block_rows = Sub (pointers, one)
    inner = Slice (row_pointers, one, minus_one)
    ends = Cast <to = 7> (inner)
    end_count = Shape (ends)
    steps = Expand (one, end_count)
    places = Add (count, one)
    none = Expand (zero, places)
    marks = ScatterElements <axis = 0> (none, ends, steps)
    rows_and_end = CumSum (marks, first)
    rows = Slice (rows_and_end, zero, count)
    row = Unsqueeze (rows, minus_one)
    columns_long = Cast <to = 7> (columns)
    column = Unsqueeze (columns_long, minus_one)
    where = Concat <axis = 1> (row, column)
"""
