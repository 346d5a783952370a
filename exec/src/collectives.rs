//! Collectives between ranks that share memory: the direct algorithm.
//!
//! Member `i` of `n` owns shard `i` (`ceil(len / n)` elements, the last ones shorter). In the reduce round each member adds up
//! its own shard from all members, in the order of the group; in the gather round it copies the other shards from their
//! owners. All members wait for each other before, between and after the rounds. Every element is summed once, by one
//! member, in one order: the result has the same bits on all members, and does not depend on timing. Each member moves
//! `(n - 1) / n` of the array per round, the least that any algorithm can.

use paceline_sim::program::Collective;
use std::ops::{AddAssign, Range};

/// A round of a collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Each member sums its own shard.
    Reduce,
    /// Each member copies the other shards.
    Gather,
}

/// The rounds of a collective, in order.
pub fn rounds(collective: Collective) -> &'static [Step] {
    match collective {
        Collective::AllReduce => &[Step::Reduce, Step::Gather],
        Collective::ReduceScatter => &[Step::Reduce],
        Collective::AllGather => &[Step::Gather],
    }
}

/// Elements of shard `index` of `shards` over `len` elements: `ceil(len / shards)` each, the last ones shorter or empty.
pub fn shard(len: usize, shards: usize, index: usize) -> Range<usize> {
    let size = len.div_ceil(shards);
    (index * size).min(len)..((index + 1) * size).min(len)
}

/// Does the part of `member` in one round, over arrays of `len` elements.
///
/// # Safety
/// Each pointer leads to `len` live, aligned, initialised elements, the arrays do not overlap, every member has entered the round, and
/// no one but the members' own calls for this round touches the arrays meanwhile.
pub unsafe fn perform<T: Copy + AddAssign + Default>(step: Step, arrays: &[*mut T], len: usize, member: usize) {
    let count = arrays.len();
    match step {
        Step::Reduce => {
            // SAFETY: in this round shard `member` of every array is touched by this call only.
            unsafe { sum(arrays, shard(len, count, member), arrays[member]) }
        }
        Step::Gather => {
            for (owner, &array) in arrays.iter().enumerate().filter(|&(owner, _)| owner != member) {
                let part = shard(len, count, owner);
                // SAFETY: in this round shard `owner` is written in every array but its owner's, each by its member.
                unsafe {
                    std::ptr::copy_nonoverlapping(array.add(part.start), arrays[member].add(part.start), part.len())
                }
            }
        }
    }
}

/// Writes the sum over all arrays, first to last, of the elements of `part` to `out`, which is one of the arrays.
///
/// # Safety
/// As for [`perform`].
unsafe fn sum<T: Copy + AddAssign + Default>(arrays: &[*mut T], part: Range<usize>, out: *mut T) {
    /// Elements that are summed before they are written: `out` may be read by a later addend, and the sum stays in cache.
    const BLOCK: usize = 1024;
    let mut block = [T::default(); BLOCK];
    let mut start = part.start;
    while start < part.end {
        let len = BLOCK.min(part.end - start);
        let total = &mut block[..len];
        // SAFETY: `start..start + len` lies within the arrays.
        unsafe {
            total.copy_from_slice(std::slice::from_raw_parts(arrays[0].add(start), len));
            for array in &arrays[1..] {
                let addend = std::slice::from_raw_parts(array.add(start), len);
                total.iter_mut().zip(addend).for_each(|(t, &a)| *t += a);
            }
            std::ptr::copy_nonoverlapping(total.as_ptr(), out.add(start), len);
        }
        start += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All members' parts of all rounds, in an order of members that the algorithm must not depend on.
    fn run<T: Copy + AddAssign + Default>(collective: Collective, arrays: &mut [Vec<T>], reversed: bool) {
        let len = arrays[0].len();
        let pointers: Vec<*mut T> = arrays.iter_mut().map(|a| a.as_mut_ptr()).collect();
        for &step in rounds(collective) {
            for n in 0..arrays.len() {
                let member = if reversed { arrays.len() - 1 - n } else { n };
                // SAFETY: the arrays live, have one length, and only this thread touches them.
                unsafe { perform(step, &pointers, len, member) };
            }
        }
    }

    #[test]
    fn shards_cover_the_array_in_order() {
        assert_eq!((0..4).map(|i| shard(10, 4, i)).collect::<Vec<_>>(), [0..3, 3..6, 6..9, 9..10]);
        // ceil(5/4) = 2: the third shard is short and the fourth is empty.
        assert_eq!((0..4).map(|i| shard(5, 4, i)).collect::<Vec<_>>(), [0..2, 2..4, 4..5, 5..5]);
        assert_eq!(shard(0, 3, 2), 0..0);
    }

    proptest! {
        #[test]
        fn equals_the_naive_result(members in 1usize..=8, len in 0usize..3000, seed: u32, reversed: bool) {
            // Integers up to 2^20 in f32: sums of eight are exact, so the expected value does not depend on order.
            let value = |m: usize, k: usize| {
                (crate::data::mix(u64::from(seed) + (m * 10_000 + k) as u64) >> 44) as f32
            };
            let arrays: Vec<Vec<f32>> = (0..members).map(|m| (0..len).map(|k| value(m, k)).collect()).collect();
            let total: Vec<f32> = (0..len).map(|k| (0..members).map(|m| value(m, k)).sum()).collect();

            let mut reduced = arrays.clone();
            run(Collective::AllReduce, &mut reduced, reversed);
            prop_assert!(reduced.iter().all(|array| *array == total));

            let mut scattered = arrays.clone();
            run(Collective::ReduceScatter, &mut scattered, reversed);
            for (member, array) in scattered.iter().enumerate() {
                let own = shard(len, members, member);
                prop_assert_eq!(&array[own.clone()], &total[own]);
            }

            let mut gathered = arrays.clone();
            run(Collective::AllGather, &mut gathered, reversed);
            let expected: Vec<f32> = (0..members).flat_map(|m| arrays[m][shard(len, members, m)].to_vec()).collect();
            prop_assert!(gathered.iter().all(|array| *array == expected));
        }
    }

    #[test]
    fn sums_in_the_order_of_the_group_with_equal_bits_on_all_members() {
        // (1e8 + 1) - 1e8 is 0 in f32 and 1e8 - 1e8 + 1 is 1: the order shows in the result.
        let mut arrays = vec![vec![1e8f32; 5], vec![1.0; 5], vec![-1e8; 5]];
        run(Collective::AllReduce, &mut arrays, true);
        assert_eq!(arrays, vec![vec![0.0; 5]; 3]);
        let mut arrays = vec![vec![1e8f32; 5], vec![-1e8; 5], vec![1.0; 5]];
        run(Collective::AllReduce, &mut arrays, false);
        assert_eq!(arrays, vec![vec![1.0; 5]; 3]);
    }

    #[test]
    fn one_f64_is_summed_as_f64() {
        let mut arrays = vec![vec![1.0f64], vec![1e-12], vec![2.0]];
        run(Collective::AllReduce, &mut arrays, false);
        assert_eq!(arrays, vec![vec![3.000_000_000_001]; 3]);
    }
}
