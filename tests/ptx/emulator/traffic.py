"""What accesses cost: 32-byte sectors of global memory, and cycles of shared memory.

CUDA C++ Programming Guide, "Device Memory Accesses" and "Shared Memory".
"""

import numba
import numpy as np

SECTOR, BANKS = 32, 32


def sectors(address: np.ndarray, width: int, thread: np.ndarray) -> tuple[int, int]:
    """The sectors that the warps touch, and the fewest that their bytes would take."""
    return _count(address.astype(np.int64), width, thread // 32, SECTOR)


def wavefronts(offset: np.ndarray, width: int, thread: np.ndarray) -> tuple[int, int]:
    """The cycles of accesses to shared memory, and those that they would take without bank conflicts.

    There are 32 banks of 4 bytes. A warp goes as one where a thread has 4 bytes, as halves at 8 and as quarters at 16.
    Each takes as many cycles as its busiest bank has different words.
    """
    words = max(width // 4, 1)
    phase = thread // (32 // words)
    return _conflicts(offset // 4, words, phase - phase[0])


@numba.njit(cache=True)
def _count(address, width, warp, size):
    touched, fewest, start = 0, 0, 0
    while start < address.shape[0]:
        end = start
        while end < address.shape[0] and warp[end] == warp[start]:
            end += 1
        lines = np.empty(2 * (end - start), np.int64)
        for n in range(start, end):
            lines[2 * (n - start)] = address[n] // size
            lines[2 * (n - start) + 1] = (address[n] + width - 1) // size
        touched += np.unique(lines).size
        fewest += ((end - start) * width + size - 1) // size
        start = end
    return touched, fewest


@numba.njit(cache=True)
def _conflicts(word, words, phase):
    cycles, fewest, start = 0, 0, 0
    while start < word.shape[0]:
        end = start
        while end < word.shape[0] and phase[end] == phase[start]:
            end += 1
        found = np.empty((end - start) * words, np.int64)
        for n in range(start, end):
            for k in range(words):
                found[(n - start) * words + k] = word[n] + k
        busy = np.zeros(BANKS, np.int64)
        distinct = np.unique(found)
        for one in distinct:
            busy[one % BANKS] += 1
        cycles += busy.max()
        fewest += (distinct.size + BANKS - 1) // BANKS
        start = end
    return cycles, fewest
