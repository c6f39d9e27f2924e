"""What a strip of rows is, as its ways are told: `strips_numba`, `tiles_numba` and `pairs_numba`."""

# They are words of int64 at the head of a thread's scratch memory, written by `strips_numba`, so that every
# way is called with one address and reads the words it needs:
#
#     word      0 1 2 ...                                                 128 bytes
#     scratch   | of all strips: SIZE ... OWN | of this one: ACTS ... NEXT | a way's own memory ...
#
# Words 0 to 4 and 15 are written once for all strips of a call, words 5 to 14 for each strip anew.
SIZE, ROW_BYTES, SCALE_BYTES, COLUMNS = range(4)  # rows of the matrix, bytes of a row and of a row of tiles
OWN = 4  # address of the way's memory
ACTS, ACT_BYTES = range(5, 7)  # address of the activations, and bytes from one token to the next
W, SCALES, FIRST, END = range(7, 11)  # the matrix and its tile scales, rows FIRST to END - 1 of it
TOKENS_AT, COUNT, OUT, NEXT = range(11, 15)  # its tokens' numbers, how many, its outputs, the next strip
ALL = 15  # tokens that activations are there for, of all jobs
STRIP_BYTES = 128
