"""RMSNorm, and a decoder, as nobody should write them: each of these is judged by the conformance suite, in
a process that it may take along.
"""

import ctypes
import os
import sys
import time

import numpy as np

from refimpl.formats import q4_k
from refimpl.reference.attention import rms_norm


def swapped(data):
    """Q4_K with nibbles the wrong way round: a kernel to be found out."""
    b = np.array(data).view(q4_k.BLOCK)
    b["qs"] = b["qs"] >> 4 | b["qs"] << 4
    return q4_k.dequantize(b.view(np.uint8))


def right(x, weight, eps):
    """Chatty, and right."""
    print("a line on stdout")
    os.write(1, b"and one past Python\n")
    return rms_norm(x, weight, eps)


def leaves(x, weight, eps):
    """With exit code 0."""
    raise SystemExit(0)


def leaves_at_once(x, weight, eps):
    """With exit code 0, of five tokens only."""
    if len(x) == 5:
        os._exit(0)
    return rms_norm(x, weight, eps)


def aborts(x, weight, eps):
    """As C's assert does."""
    os.abort()


def segfaults(x, weight, eps):
    """Reads where nothing is."""
    return ctypes.string_at(8)


def reads_past_the_end(x, weight, eps):
    """One byte of what lies behind its input, which changes nothing."""
    ctypes.string_at(x.ctypes.data + x.nbytes, 1)
    return rms_norm(x, weight, eps)


def reads_before_the_start(x, weight, eps):
    """As a loop that runs backwards one step too far."""
    ctypes.string_at(weight.ctypes.data - 1, 1)
    return rms_norm(x, weight, eps)


def hangs(x, weight, eps):
    """On forty tokens."""
    while len(x) == 40:
        time.sleep(1)
    return rms_norm(x, weight, eps)


def hoards(x, weight, eps):
    """Half a gigabyte more at each call."""
    held.append(np.ones(2**26))
    return rms_norm(x, weight, eps)


held = []


def nothing(x, weight, eps):
    """Returns None."""
    rms_norm(x, weight, eps)


def numbers_one_by_one(x, weight, eps):
    """Returns a generator."""
    return (row for row in rms_norm(x, weight, eps))


def a_list(x, weight, eps):
    """Returns lists of floats."""
    return rms_norm(x, weight, eps).tolist()


def and_none(x, weight, eps):
    """Returns one result too many."""
    return rms_norm(x, weight, eps), None


def wide(x, weight, eps):
    """Returns float64."""
    return rms_norm(x, weight, eps).astype(np.float64)


def transposed(x, weight, eps):
    """Returns columns for rows."""
    return rms_norm(x, weight, eps).T


def raises(x, weight, eps):
    """Says no."""
    raise ValueError("not today")


if __name__ == "__main__":
    sys.exit("to be judged, not run")


def of_tensors(x, weight, eps):
    """RMSNorm of tensors, one percent too small."""
    return 0.99 * x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
