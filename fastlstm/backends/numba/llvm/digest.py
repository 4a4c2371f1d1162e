"""The digest of weights, by which a kernel sees that they differ from those that were packed."""

from llvmlite import ir

from fastlstm.backends.numba.llvm.loops import Builder, for_loop
from fastlstm.backends.numba.llvm.simd import I32, I64, VECTOR_BYTES, VectorType, load, store

# CHAINS: as many vectors as keep the units busy and stay in registers. ROUNDS: the pairs that a lane takes for one
# multiplication, which is by far the slowest of its operations.
DIGEST_CHAINS = 8 if VECTOR_BYTES == 64 else 4
DIGEST_ROUNDS = 4
DIGEST_BYTES = (DIGEST_CHAINS + 1) * VECTOR_BYTES


def digest(vtype: VectorType) -> Builder:
    """Return the builder of the digest of `words` 32-bit words. If `mismatches` is 0, it stores the DIGEST_BYTES at
    `stored`. Otherwise it compares them, and adds one to the counter at `mismatches` if they differ.

    Two words are a pair of 64 bits. The state of the digest is many 64-bit numbers, here called lanes, and each pair
    changes one of them::

        lane = rotate_left(lane + pair, 13)                 (mod 2**64)
        lane = lane * 0x9E3779B1                            after every fourth pair, and after each that is left over

    Only the last vector, which has lanes of its own, may overlap pairs before it. All lanes are compared, so nothing in
    one makes up for another. Signs and exponents of a pair's numbers lie a multiple of 8 bits apart: rotating by 13
    turns none into another's place. Each step is one-to-one, so a change of one pair is always seen, and one of several
    unseen with odds of about 2**-64. The digest is not cryptographic: a collision can be computed.
    """
    bytes_ = vtype.size * vtype.count
    count, chains = bytes_ // 8, DIGEST_CHAINS
    vector = ir.VectorType(I64, count)

    def step(b: ir.IRBuilder, lane: ir.Value, pair: ir.Value, multiplies: bool = True) -> ir.Value:
        def constant(value: int) -> ir.Constant:
            return ir.Constant(lane.type, [value] * count if lane.type == vector else value)

        lane = b.add(lane, pair)
        lane = b.or_(b.shl(lane, constant(13)), b.lshr(lane, constant(51)))
        return b.mul(lane, constant(0x9E3779B1)) if multiplies else lane

    def build(b, words, source, stored, mismatches):
        def many(source, *states):
            for k in range(DIGEST_ROUNDS):
                pairs = [load(b, vector, b.add(source, I64((k * chains + n) * bytes_)), 4) for n in range(chains)]
                states = [step(b, *each, k == DIGEST_ROUNDS - 1) for each in zip(states, pairs)]
            return [b.add(source, I64(DIGEST_ROUNDS * chains * bytes_)), *states]

        def one(source, state):
            return [b.add(source, I64(bytes_)), step(b, state, load(b, vector, source, 4))]

        def word(source, state):
            return [b.add(source, I64(4)), step(b, state, b.zext(load(b, I32, source), I64))]

        size, start = bytes_ // 4, source
        states = [ir.Constant(vector, [n * count + k + 1 for k in range(count)]) for n in range(chains)]
        source, *states = for_loop(b, b.udiv(words, I64(DIGEST_ROUNDS * chains * size)), [source, *states], many)
        rest = b.urem(words, I64(DIGEST_ROUNDS * chains * size))
        source, states[0] = for_loop(b, b.udiv(rest, I64(size)), [source, states[0]], one)
        # Less than a vector is left over: the last whole vector covers it, or, if there is none, a word at a time.
        left, has_whole = b.urem(words, I64(size)), b.icmp_signed(">=", words, I64(size))
        overlaps = b.zext(b.and_(b.icmp_signed(">", left, I64(0)), has_whole), I64)
        last = b.sub(b.add(start, b.mul(words, I64(4))), I64(bytes_))
        tail = for_loop(b, overlaps, [last, ir.Constant(vector, [7] * count)], one)[1]
        few = for_loop(b, b.select(has_whole, I64(0), left), [source, I64(7)], word)[1]
        states.append(b.insert_element(tail, b.xor(b.extract_element(tail, I32(0)), few), I32(0)))

        addresses, zeros = [b.add(stored, I64(n * bytes_)) for n in range(chains + 1)], ir.Constant(vector, [0] * count)
        stores = b.icmp_signed("==", mismatches, I64(0))
        with b.if_else(stores) as (then, otherwise):
            with then:
                for state, address in zip(states, addresses):
                    store(b, state, address, 4)
            with otherwise:
                differs = zeros
                for state, address in zip(states, addresses):
                    differs = b.or_(differs, b.xor(state, load(b, vector, address, 4)))
                lanes_differ = b.bitcast(b.icmp_signed("!=", differs, zeros), ir.IntType(count))
                with b.if_then(b.icmp_signed("!=", lanes_differ, ir.IntType(count)(0))):
                    b.atomic_rmw("add", b.inttoptr(mismatches, I64.as_pointer()), I64(1), "monotonic")

    return build
