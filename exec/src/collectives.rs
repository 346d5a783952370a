//! Collectives between ranks that share memory, round by round ([`Step`]).
//!
//! Member `i` of `n` owns part `i` of the array ([`Parts`]). All members wait for each other before, between and after the
//! rounds. Every element is summed once per level, by one member, in one order: the result has the same bits on all members, and
//! does not depend on timing.
//!
//! A member's part may lie apart from its array (its shard): then the last round of a reduction adds the sum to what is
//! there, and the first round of a gather takes the part from there.

use crate::numbers::Addend;
use paceline_sim::program::{Step, tree_offsets};
use smallvec::SmallVec;
use std::ops::Range;

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

    /// Elements of a part where all `members` have the same.
    fn whole(self, members: usize) -> usize {
        self.len / members
    }

    /// The elements of part `index`.
    pub fn of(self, index: usize) -> Range<usize> {
        (index * self.part).min(self.len)..((index + 1) * self.part).min(self.len)
    }
}

/// How members lie over fast groups: member `k` of `members` in group `k mod groups`.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Members of the collective.
    pub members: usize,
    /// Fast groups.
    pub groups: usize,
}

/// Where elements lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// From this element of a member's array on.
    Array { member: usize, element: usize },
    /// From the begin of a member's shard on.
    Shard { member: usize },
}

/// A piece of the work of one member in one round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Move {
    /// Sums `part` over the arrays of members, in this order, and writes it or adds it to what is there.
    Sum { addends: SmallVec<[usize; 8]>, part: Range<usize>, to: Place, adds: bool },
    /// Copies elements to another place.
    Copy { from: Place, to: Place, len: usize },
    /// Two places change elements.
    Swap { one: Place, other: Place, len: usize },
}

impl Shape {
    /// The members at the place of one, in the order of groups.
    fn peers_across(self, member: usize) -> Range<usize> {
        let first = member - member % self.groups;
        first..first + self.groups
    }

    /// The members of the group of one, in the order of places.
    fn peers_within(self, member: usize) -> impl Iterator<Item = usize> {
        (member % self.groups..self.members).step_by(self.groups)
    }

    /// The members with whom this one does the exchange, of those that lie in a circle of `around` members with this distance between
    /// them: each pair is somebody's, and everybody has about as many.
    fn partners(self, member: usize, distance: usize, around: usize) -> impl Iterator<Item = usize> {
        let place = member / distance % around;
        let first = member - place * distance;
        let opposite = around.is_multiple_of(2) && place < around / 2;
        let ahead = 1..=(around - 1) / 2 + usize::from(opposite && around > 1);
        ahead.map(move |ahead| first + (place + ahead) % around * distance)
    }

    /// The member at a position of the ring, which goes through one group after the other.
    fn on_ring(self, position: usize) -> usize {
        let (places, position) = (self.members / self.groups, position % self.members);
        (position % places) * self.groups + position / places
    }

    /// Position on the ring.
    fn position(self, member: usize) -> usize {
        (member % self.groups) * (self.members / self.groups) + member / self.groups
    }

    /// What `member` does in a round. `apart` tells whose part lies apart. In no round does a member read elements that another
    /// one writes:
    /// - the direct rounds and those across write, in each array, parts that no other member reads: a reduction its own part, a
    ///   gather the parts of others, which are read from their owners;
    /// - on the ring, a member reads the part that its predecessor finished in the turn before, and the predecessor writes
    ///   another;
    /// - on trees, a gather writes parts whose distance behind the own one has this turn's binary digit as its lowest, and others read
    ///   those with higher digits only; a reduction is its mirror image;
    /// - of the places that two members change, no third one touches either, and one of the two does all the work;
    /// - a reduction within a group writes the parts of its place, which the others of the group do not read; a gather within
    ///   reads the parts of the owner's place, which the owner does not write.
    pub fn moves(self, step: Step, parts: Parts, member: usize, apart: impl Fn(usize) -> bool) -> Vec<Move> {
        let count = self.members;
        let place = |member: usize, element: usize| Place::Array { member, element };
        let finish = |addends: SmallVec<[usize; 8]>| {
            let part = parts.of(member);
            match apart(member) {
                true => Move::Sum { addends, part, to: Place::Shard { member }, adds: true },
                false => Move::Sum { addends, to: place(member, part.start), part, adds: false },
            }
        };
        // Part `owner`, from the array of its owner or another member that has it.
        let copy = |owner: usize, from: usize| {
            let part = parts.of(owner);
            let source = match owner == from && apart(from) {
                true => Place::Shard { member: from },
                false if from == member => return None,
                false => place(from, part.start),
            };
            Some(Move::Copy { from: source, to: place(member, part.start), len: part.len() })
        };
        let of_place = |peer: usize| {
            let peers = self.peers_across(peer);
            parts.of(peers.start).start..parts.of(peers.end - 1).end
        };
        match step {
            Step::Reduce => vec![finish((0..count).collect())],
            Step::Gather => (0..count).filter_map(|owner| copy(owner, owner)).collect(),
            Step::RingReduce { turn } => {
                let position = self.position(member) + count;
                let before = self.on_ring(position - 1);
                let owner = self.on_ring(position + count - turn as usize - 2);
                if owner == member {
                    return vec![finish(SmallVec::from_slice(&[before, member]))];
                }
                let part = parts.of(owner);
                let to = place(member, part.start);
                vec![Move::Sum { addends: SmallVec::from_slice(&[before, member]), part, to, adds: false }]
            }
            Step::RingGather { turn } => {
                let position = self.position(member) + count;
                let before = self.on_ring(position - 1);
                let owner = self.on_ring(position + count - turn as usize - 1);
                let own = if turn == 0 { copy(member, member) } else { None };
                // After the first turn the owner's part comes out of the array of the member before.
                let part = parts.of(owner);
                let passed =
                    Move::Copy { from: place(before, part.start), to: place(member, part.start), len: part.len() };
                let other = if turn == 0 { copy(owner, before) } else { Some(passed) };
                own.into_iter().chain(other).collect()
            }
            Step::TreeGather { turn } => {
                let behind = |offset: usize| self.on_ring(self.position(member) + offset);
                let from = behind(1 << turn);
                let own = if turn == last_turn(count) { copy(member, member) } else { None };
                let others = tree_offsets(count as u32, turn).filter_map(|offset| {
                    let owner = behind(offset as usize);
                    if owner == from {
                        return copy(owner, from);
                    }
                    let part = parts.of(owner);
                    let (there, here) = (place(from, part.start), place(member, part.start));
                    Some(Move::Copy { from: there, to: here, len: part.len() })
                });
                own.into_iter().chain(others).collect()
            }
            Step::TreeReduce { turn } => {
                let position = self.position(member) + count;
                let before = self.on_ring(position - (1 << turn));
                let addends = || SmallVec::from_slice(&[before, member]);
                let summed = tree_offsets(count as u32, turn).map(|offset| {
                    let owner = self.on_ring(position + offset as usize - (1 << turn));
                    if owner == member && turn == last_turn(count) {
                        return finish(addends());
                    }
                    let part = parts.of(owner);
                    Move::Sum { addends: addends(), to: place(member, part.start), part, adds: false }
                });
                summed.collect()
            }
            Step::Exchange => {
                let len = parts.whole(count);
                self.partners(member, 1, count)
                    .map(|other| Move::Swap { one: place(member, other * len), other: place(other, member * len), len })
                    .collect()
            }
            Step::ExchangeWithin => {
                let (len, own) = (parts.whole(count), member / self.groups);
                let all: Vec<usize> = self.partners(member, self.groups, count / self.groups).collect();
                let swap = |other: usize| Move::Swap {
                    one: place(member, other / self.groups * self.groups * len),
                    other: place(other, own * self.groups * len),
                    len: self.groups * len,
                };
                all.into_iter().map(swap).collect()
            }
            Step::ExchangeAcross => {
                let (len, own) = (parts.whole(count), member % self.groups);
                let all: Vec<usize> = self.partners(member, 1, self.groups).collect();
                let of = |other: usize| {
                    let part = move |of: usize, place: usize, group: usize| Place::Array {
                        member: of,
                        element: (place * self.groups + group) * len,
                    };
                    (0..count / self.groups).map(move |place| Move::Swap {
                        one: part(member, place, other % self.groups),
                        other: part(other, place, own),
                        len,
                    })
                };
                all.into_iter().flat_map(of).collect()
            }
            Step::ReduceWithin => {
                let part = of_place(member);
                let to = place(member, part.start);
                vec![Move::Sum { addends: self.peers_within(member).collect(), part, to, adds: false }]
            }
            Step::ReduceAcross => vec![finish(self.peers_across(member).collect())],
            Step::GatherAcross => self.peers_across(member).filter_map(|owner| copy(owner, owner)).collect(),
            Step::GatherWithin => {
                let others = self.peers_within(member).filter(|&peer| peer != member);
                let copies = others.map(|peer| {
                    let part = of_place(peer);
                    Move::Copy { from: place(peer, part.start), to: place(member, part.start), len: part.len() }
                });
                copies.collect()
            }
        }
    }
}

/// The number of the turn over the greatest distance.
fn last_turn(members: usize) -> u32 {
    (members.max(2) as u32 - 1).ilog2()
}

/// What a member brings.
#[derive(Debug, Clone, Copy)]
pub struct Member<T> {
    /// Its array.
    pub array: *mut T,
    /// Its part, where that lies apart.
    pub shard: Option<*mut T>,
}

/// Does the part of `member` in one round, on members that lie evenly over `groups` fast groups.
///
/// # Safety
/// Each array leads to `parts.len` live, aligned, initialised elements, each shard to as many as the member's part has; no two
/// overlap, every member has entered the round, and no one but the members' own calls for this round touches them meanwhile.
pub unsafe fn perform<T: Addend>(step: Step, members: &[Member<T>], groups: usize, parts: Parts, member: usize) {
    let shape = Shape { members: members.len(), groups };
    // SAFETY: the element lies within the array; a place in a shard is asked for only where there is one.
    let at = |place: Place| match place {
        Place::Array { member, element } => unsafe { members[member].array.add(element) },
        Place::Shard { member } => members[member].shard.unwrap_or(members[member].array),
    };
    for work in shape.moves(step, parts, member, |member| members[member].shard.is_some()) {
        // SAFETY: the caller's promise, and no member reads what another one writes.
        match work {
            Move::Sum { addends, part, to, adds } => {
                let addends: SmallVec<[Member<T>; 8]> = addends.iter().map(|&addend| members[addend]).collect();
                unsafe { sum(&addends, part, at(to), adds) };
            }
            Move::Copy { from, to, len } => unsafe { std::ptr::copy_nonoverlapping(at(from), at(to), len) },
            Move::Swap { one, other, len } => unsafe { std::ptr::swap_nonoverlapping(at(one), at(other), len) },
        }
    }
}

/// Writes the sum over all arrays, first to last, of the elements of `part` to `out`, or adds it to what is there. `out` may be
/// the same elements of one of the arrays.
///
/// # Safety
/// As for [`perform`].
unsafe fn sum<T: Addend>(members: &[Member<T>], part: Range<usize>, out: *mut T, adds: bool) {
    /// Elements that are summed before they are written: `out` may be read by a later addend, and the sum stays in cache.
    const BLOCK: usize = 1024;
    let mut block = [T::Sum::default(); BLOCK];
    let mut start = part.start;
    while start < part.end {
        let len = BLOCK.min(part.end - start);
        let total = &mut block[..len];
        // SAFETY: `start..start + len` lies within the arrays, and as far into `out` as into the part.
        unsafe {
            let out = out.add(start - part.start);
            let first = std::slice::from_raw_parts(members[0].array.add(start), len);
            total.iter_mut().zip(first).for_each(|(t, a)| *t = a.widen());
            for member in &members[1..] {
                let addend = std::slice::from_raw_parts(member.array.add(start), len);
                total.iter_mut().zip(addend).for_each(|(t, a)| *t += a.widen());
            }
            let there = std::slice::from_raw_parts_mut(out, len);
            let pairs = there.iter_mut().zip(&*total);
            if adds {
                pairs.for_each(|(there, &t)| {
                    let mut sum = there.widen();
                    sum += t;
                    *there = T::narrow(sum);
                });
            } else {
                pairs.for_each(|(there, &t)| *there = T::narrow(t));
            }
        }
        start += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_sim::program::{Algorithm, Collective, rounds};
    use proptest::prelude::*;

    /// All members' parts of all rounds, in an order of members that the algorithm must not depend on.
    fn run_over<T: Addend>(
        (collective, algorithm): (Collective, Algorithm),
        groups: usize,
        arrays: &mut [Vec<T>],
        shards: Option<&mut [Vec<T>]>,
        reversed: bool,
    ) {
        let len = arrays[0].len();
        let mut apart: Vec<Option<*mut T>> = vec![None; arrays.len()];
        if let Some(shards) = shards {
            apart = shards.iter_mut().map(|shard| Some(shard.as_mut_ptr())).collect();
        }
        let members: Vec<Member<T>> =
            arrays.iter_mut().zip(apart).map(|(array, shard)| Member { array: array.as_mut_ptr(), shard }).collect();
        for step in rounds(collective, algorithm, members.len() as u32, groups as u32) {
            for n in 0..members.len() {
                let member = if reversed { members.len() - 1 - n } else { n };
                // SAFETY: the arrays live, have one length, and only this thread touches them.
                unsafe { perform(step, &members, groups, Parts::even(len, members.len()), member) };
            }
        }
    }

    fn run<T: Addend>(collective: Collective, arrays: &mut [Vec<T>], reversed: bool) {
        run_over((collective, Algorithm::Direct), 1, arrays, None, reversed);
    }

    #[test]
    fn parts_cover_the_array_in_order() {
        let all = |len| (0..4).map(|i| Parts::even(len, 4).of(i)).collect::<Vec<_>>();
        assert_eq!(all(10), [0..3, 3..6, 6..9, 9..10]);
        // ceil(5/4) = 2: the third part is short and the fourth is empty.
        assert_eq!(all(5), [0..2, 2..4, 4..5, 5..5]);
        assert_eq!(Parts::even(0, 3).of(2), 0..0);
    }

    /// Integers up to 2^20 in f32: sums of sixteen are exact, so the expected value does not depend on order.
    fn value(seed: u32, member: usize, element: usize) -> f32 {
        (crate::data::mix(u64::from(seed) + (member * 10_000 + element) as u64) >> 44) as f32
    }

    /// Every algorithm over every number of groups, against sums and copies of whole arrays.
    fn check(members: usize, len: usize, seed: u32, reversed: bool) {
        let arrays: Vec<Vec<f32>> = (0..members).map(|m| (0..len).map(|k| value(seed, m, k)).collect()).collect();
        let total: Vec<f32> = (0..len).map(|k| (0..members).map(|m| value(seed, m, k)).sum()).collect();
        let parts = Parts::even(len, members);
        for groups in (1..=members).filter(|groups| members.is_multiple_of(*groups)) {
            for algorithm in [Algorithm::Direct, Algorithm::Ring, Algorithm::Tree, Algorithm::TwoLevel] {
                let what = format!("{algorithm:?} of {members} in {groups} groups, {len} elements");
                let run = |collective, arrays: &mut [Vec<f32>], shards: Option<&mut [Vec<f32>]>| {
                    run_over((collective, algorithm), groups, arrays, shards, reversed);
                };
                let mut reduced = arrays.clone();
                run(Collective::AllReduce, &mut reduced, None);
                assert!(reduced.iter().all(|array| *array == total), "{what}");

                let mut scattered = arrays.clone();
                run(Collective::ReduceScatter, &mut scattered, None);
                for (member, array) in scattered.iter().enumerate() {
                    assert_eq!(array[parts.of(member)], total[parts.of(member)], "{what}");
                }
                let gathered_all: Vec<f32> = (0..members).flat_map(|m| arrays[m][parts.of(m)].to_vec()).collect();
                let mut gathered = arrays.clone();
                run(Collective::AllGather, &mut gathered, None);
                assert!(gathered.iter().all(|array| *array == gathered_all), "{what}");

                let part = len / members;
                let mut changed = arrays.clone();
                run(Collective::AllToAll, &mut changed, None);
                for (member, array) in changed.iter().enumerate() {
                    let brought = arrays.iter().flat_map(|from| from[member * part..(member + 1) * part].to_vec());
                    let rest = arrays[member][members * part..].iter().copied();
                    assert_eq!(*array, brought.chain(rest).collect::<Vec<f32>>(), "{what}");
                }

                // With shards apart, sums are added to what is there, and gathers read from there.
                let own: Vec<Vec<f32>> = (0..members).map(|m| vec![7.0; parts.of(m).len()]).collect();
                let (mut scattered, mut shards) = (arrays.clone(), own);
                run(Collective::ReduceScatter, &mut scattered, Some(&mut shards));
                for (member, shard) in shards.iter().enumerate() {
                    let expected: Vec<f32> = total[parts.of(member)].iter().map(|t| t + 7.0).collect();
                    assert_eq!(*shard, expected, "{what}");
                }
                let mut gathered = vec![vec![f32::NAN; len]; members];
                run(Collective::AllGather, &mut gathered, Some(&mut shards));
                assert!(gathered.iter().all(|array| *array == shards.concat()), "{what}");
            }
        }
    }

    #[test]
    fn every_group_shape_up_to_twelve_ranks_equals_the_naive_result() {
        for members in 1..=12 {
            for len in [0, 1, members - 1, members, 2 * members + 1, 97, 1500] {
                check(members, len, 3, false);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn equals_the_naive_result(members in 1usize..=12, len in 0usize..3000, seed: u32, reversed: bool) {
            check(members, len, seed, reversed);
        }
    }

    /// Members of a round work at the same time: what one writes no other may touch.
    #[test]
    fn no_member_touches_what_another_one_writes() {
        for (members, groups) in (1..=12usize).flat_map(|members| (1..=members).map(move |groups| (members, groups))) {
            if !members.is_multiple_of(groups) {
                continue;
            }
            let shape = Shape { members, groups };
            for collective in
                [Collective::AllReduce, Collective::ReduceScatter, Collective::AllGather, Collective::AllToAll]
            {
                for algorithm in [Algorithm::Direct, Algorithm::Ring, Algorithm::Tree, Algorithm::TwoLevel] {
                    for step in rounds(collective, algorithm, members as u32, groups as u32) {
                        let parts = Parts::even(3 * members, members);
                        // By member of the array and element: who reads, and who writes.
                        let mut touched: std::collections::BTreeMap<(usize, usize), Vec<(usize, bool)>> =
                            Default::default();
                        for by in 0..members {
                            let mut touch = |place: Place, len: usize, writes: bool| {
                                let Place::Array { member, element } = place else { return };
                                for n in element..element + len {
                                    touched.entry((member, n)).or_default().push((by, writes));
                                }
                            };
                            for work in shape.moves(step, parts, by, |_| false) {
                                match work {
                                    Move::Sum { addends, part, to, .. } => {
                                        touch(to, part.len(), true);
                                        for member in addends {
                                            touch(Place::Array { member, element: part.start }, part.len(), false);
                                        }
                                    }
                                    Move::Copy { from, to, len } => {
                                        touch(from, len, false);
                                        touch(to, len, true);
                                    }
                                    Move::Swap { one, other, len } => {
                                        touch(one, len, true);
                                        touch(other, len, true);
                                    }
                                }
                            }
                        }
                        for (at, by) in touched {
                            let writers: Vec<usize> =
                                by.iter().filter(|(_, writes)| *writes).map(|(by, _)| *by).collect();
                            let alone = writers.iter().all(|writer| by.iter().all(|(other, _)| other == writer));
                            assert!(alone, "{step:?} of {members} in {groups} groups: {at:?} by {by:?}");
                        }
                    }
                }
            }
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
    fn narrow_elements_are_summed_wide_and_rounded_once() {
        use half::bf16;
        // Half a unit in the last place of 256 is lost in each narrow sum, and together they make one unit.
        let of = |value: f32| vec![bf16::from_f32(value); 3];
        let mut arrays = vec![of(256.0), of(1.0), of(1.0)];
        run(Collective::AllReduce, &mut arrays, false);
        assert_eq!(arrays, vec![of(258.0); 3]);
        let mut shards = vec![vec![bf16::from_f32(1.0)]; 3];
        let mut arrays = vec![of(254.0), of(1.0), of(1.0)];
        run_over((Collective::ReduceScatter, Algorithm::Direct), 1, &mut arrays, Some(&mut shards), false);
        assert_eq!(shards, vec![vec![bf16::from_f32(256.0)]; 3], "257 is rounded to even");
    }

    #[test]
    fn one_f64_is_summed_as_f64() {
        let mut arrays = vec![vec![1.0f64], vec![1e-12], vec![2.0]];
        run(Collective::AllReduce, &mut arrays, false);
        assert_eq!(arrays, vec![vec![3.000_000_000_001]; 3]);
    }
}
