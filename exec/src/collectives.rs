//! Collectives between ranks that share memory: the direct algorithm.
//!
//! Member `i` of `n` owns part `i` of the array ([`Parts`]). In the reduce round each member adds up its own part from all
//! members, in the order of the group; in the gather round it copies the other parts from their owners. All members wait for
//! each other before, between and after the rounds. Every element is summed once, by one member, in one order: the result
//! has the same bits on all members, and does not depend on timing. Each member moves `(n - 1) / n` of the array per
//! round, the least that any algorithm can.
//!
//! A member's part may lie apart from its array (its shard): then the reduce round adds the sum to what is there, and the
//! gather round takes the part from there.

use paceline_sim::program::Collective;
use std::ops::{AddAssign, Range};

/// A round of a collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Each member sums its own part.
    Reduce,
    /// Each member copies the other parts.
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

/// How an array is cut: member `i` has `part` elements from `i * part` on, the last ones fewer or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// Elements of the array.
    pub len: usize,
    /// Elements of a part.
    pub part: usize,
}

impl Parts {
    /// An array shared out evenly, rounded up.
    #[cfg(test)]
    pub fn even(len: usize, members: usize) -> Parts {
        Parts { len, part: len.div_ceil(members) }
    }

    /// The elements of part `index`.
    pub fn of(self, index: usize) -> Range<usize> {
        (index * self.part).min(self.len)..((index + 1) * self.part).min(self.len)
    }
}

/// What a member brings.
#[derive(Debug, Clone, Copy)]
pub struct Member<T> {
    /// Its array.
    pub array: *mut T,
    /// Its part, where that lies apart.
    pub shard: Option<*mut T>,
}

/// Does the part of `member` in one round.
///
/// # Safety
/// Each array leads to `parts.len` live, aligned, initialised elements, each shard to as many as the member's part has; no two
/// overlap, every member has entered the round, and no one but the members' own calls for this round touches them meanwhile.
pub unsafe fn perform<T: Copy + AddAssign + Default>(step: Step, members: &[Member<T>], parts: Parts, member: usize) {
    match step {
        Step::Reduce => {
            let part = parts.of(member);
            // SAFETY: in this round part `member` of every array, and the shard of `member`, are touched by this call only.
            unsafe {
                match members[member].shard {
                    Some(shard) => sum(members, part, shard, true),
                    None => sum(members, part.clone(), members[member].array.add(part.start), false),
                }
            }
        }
        Step::Gather => {
            for (owner, held) in members.iter().enumerate() {
                let part = parts.of(owner);
                // SAFETY: in this round shards are read, and part `owner` is written in every array but its owner's, or in
                // that too, by its member, when the owner's part is read from its shard.
                unsafe {
                    let from = match held.shard {
                        Some(shard) => shard,
                        None if owner == member => continue,
                        None => held.array.add(part.start),
                    };
                    std::ptr::copy_nonoverlapping(from, members[member].array.add(part.start), part.len());
                }
            }
        }
    }
}

/// Writes the sum over all arrays, first to last, of the elements of `part` to `out`, or adds it to what is there. `out` may be
/// the same elements of one of the arrays.
///
/// # Safety
/// As for [`perform`].
unsafe fn sum<T: Copy + AddAssign + Default>(members: &[Member<T>], part: Range<usize>, out: *mut T, adds: bool) {
    /// Elements that are summed before they are written: `out` may be read by a later addend, and the sum stays in cache.
    const BLOCK: usize = 1024;
    let mut block = [T::default(); BLOCK];
    let mut start = part.start;
    while start < part.end {
        let len = BLOCK.min(part.end - start);
        let total = &mut block[..len];
        // SAFETY: `start..start + len` lies within the arrays, and as far into `out` as into the part.
        unsafe {
            let out = out.add(start - part.start);
            total.copy_from_slice(std::slice::from_raw_parts(members[0].array.add(start), len));
            for member in &members[1..] {
                let addend = std::slice::from_raw_parts(member.array.add(start), len);
                total.iter_mut().zip(addend).for_each(|(t, &a)| *t += a);
            }
            if adds {
                let there = std::slice::from_raw_parts_mut(out, len);
                there.iter_mut().zip(&*total).for_each(|(there, &t)| *there += t);
            } else {
                std::ptr::copy_nonoverlapping(total.as_ptr(), out, len);
            }
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
        let members: Vec<Member<T>> =
            arrays.iter_mut().map(|a| Member { array: a.as_mut_ptr(), shard: None }).collect();
        for &step in rounds(collective) {
            for n in 0..arrays.len() {
                let member = if reversed { arrays.len() - 1 - n } else { n };
                // SAFETY: the arrays live, have one length, and only this thread touches them.
                unsafe { perform(step, &members, Parts::even(len, members.len()), member) };
            }
        }
    }

    #[test]
    fn parts_cover_the_array_in_order() {
        let all = |len| (0..4).map(|i| Parts::even(len, 4).of(i)).collect::<Vec<_>>();
        assert_eq!(all(10), [0..3, 3..6, 6..9, 9..10]);
        // ceil(5/4) = 2: the third part is short and the fourth is empty.
        assert_eq!(all(5), [0..2, 2..4, 4..5, 5..5]);
        assert_eq!(Parts::even(0, 3).of(2), 0..0);
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
                let own = Parts::even(len, members).of(member);
                prop_assert_eq!(&array[own.clone()], &total[own]);
            }

            let mut gathered = arrays.clone();
            run(Collective::AllGather, &mut gathered, reversed);
            let expected: Vec<f32> = (0..members).flat_map(|m| arrays[m][Parts::even(len, members).of(m)].to_vec()).collect();
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
