//! What one address space still lacks, and where it belongs by now.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use super::late::LATE_FROM;
use crate::mask::SomePages;

/// Pages side by side that have not been put in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lack {
    end: u64,
    /// Address that the first one has in store: where it was when the tree was
    /// dumped. The process may have moved it since.
    from: u64,
}

/// A part of what is lacking that somebody takes care of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Claim {
    /// Where it belongs.
    pub(super) to: u64,
    /// Its address in store.
    pub(super) from: u64,
    pub(super) bytes: u64,
}

/// What is lacking, by the address where it belongs.
#[derive(Debug, Clone, Default)]
struct Lacks(BTreeMap<u64, Lack>);

/// What one address space still lacks.
#[derive(Debug, Clone, Default)]
pub(super) struct Plan {
    /// What can be put in place.
    lacks: Lacks,
    /// What is not on this host yet; see [`LATE_FROM`].
    late: Lacks,
    /// To come first, in this order.
    first: VecDeque<Range<u64>>,
    /// To come after these.
    then: VecDeque<SomePages>,
    /// Where the last claim ended.
    at: u64,
}

impl Lacks {
    /// Of ranges that ascend. A map that is made of all its entries takes a tenth of the
    /// time of one that they are put into.
    fn ascending(ranges: Vec<(Range<u64>, u64)>) -> Self {
        let mut joined: Vec<(u64, Lack)> = Vec::with_capacity(ranges.len());
        for (Range { start, end }, from) in ranges {
            match joined.last_mut() {
                Some((before, lack))
                    if lack.end == start && lack.from + (start - *before) == from =>
                {
                    lack.end = end;
                }
                _ => joined.push((start, Lack { end, from })),
            }
        }
        Self(joined.into_iter().collect())
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|(at, lack)| lack.end - at).sum()
    }

    fn put(&mut self, start: u64, end: u64, from: u64) {
        if let Some((&before, lack)) = self.0.range_mut(..start).next_back()
            && lack.end == start
            && lack.from + (start - before) == from
        {
            lack.end = end;
            return;
        }
        self.0.insert(start, Lack { end, from });
    }

    /// Forgets a range and returns what it lacked.
    fn take(&mut self, range: Range<u64>) -> Vec<Claim> {
        let mut taken = Vec::new();
        if range.is_empty() {
            return taken;
        }
        let first = self
            .0
            .range(..range.start)
            .next_back()
            .filter(|(_, lack)| lack.end > range.start)
            .map_or(range.start, |(&start, _)| start);
        let starts: Vec<u64> = self
            .0
            .range(first..range.end)
            .map(|(&start, _)| start)
            .collect();
        for start in starts {
            let Some(lack) = self.0.remove(&start) else {
                continue;
            };
            let (from, to) = (start.max(range.start), lack.end.min(range.end));
            if start < from {
                self.0.insert(
                    start,
                    Lack {
                        end: from,
                        from: lack.from,
                    },
                );
            }
            if to < lack.end {
                self.0.insert(
                    to,
                    Lack {
                        end: lack.end,
                        from: lack.from + (to - start),
                    },
                );
            }
            taken.push(Claim {
                to: from,
                from: lack.from + (from - start),
                bytes: to - from,
            });
        }
        taken
    }

    /// What is lacking from `address` on, without a gap, at most `bytes`.
    fn at(&self, address: u64, bytes: u64) -> Option<Claim> {
        let (&start, lack) = self.0.range(..=address).next_back()?;
        (address < lack.end).then(|| Claim {
            to: address,
            from: lack.from + (address - start),
            bytes: bytes.min(lack.end - address),
        })
    }
}

impl Plan {
    pub(super) fn is_empty(&self) -> bool {
        self.lacks.0.is_empty() && self.late.0.is_empty()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.lacks.bytes() + self.late.bytes()
    }

    /// What these pages lack, as [`insert`](Self::insert) says; many at once.
    pub(super) fn of(lacking: Vec<(Range<u64>, u64)>) -> Self {
        let ascends = lacking.is_sorted_by(|(one, _), (next, _)| one.end <= next.start);
        let mut plan = Self::default();
        if !ascends {
            for (range, from) in lacking {
                plan.insert(range, from);
            }
            return plan;
        }
        let (here, late) = lacking
            .into_iter()
            .filter(|(range, _)| !range.is_empty())
            .partition(|&(_, from)| from < LATE_FROM);
        plan.lacks = Lacks::ascending(here);
        plan.late = Lacks::ascending(late);
        plan
    }

    /// Adds pages that are in store at `from` and belong at `range`, in place
    /// of whatever was to come there.
    pub(super) fn insert(&mut self, range: Range<u64>, from: u64) {
        if range.is_empty() {
            return;
        }
        self.take(range.clone());
        self.put(range.start, range.end, from);
    }

    fn put(&mut self, start: u64, end: u64, from: u64) {
        if from < LATE_FROM {
            self.lacks.put(start, end, from);
        } else {
            self.late.put(start, end, from);
        }
    }

    /// These come first.
    pub(super) fn hurry(&mut self, range: Range<u64>) {
        self.first.push_back(range);
    }

    /// These come after those, and before the rest.
    pub(super) fn hurry_then(&mut self, some: SomePages) {
        self.then.push_back(some);
    }

    /// What is in a hurry and has not been looked at.
    fn hurried(&mut self) -> Option<Range<u64>> {
        loop {
            if let Some(range) = self.first.pop_front() {
                return Some(range);
            }
            match self.then.front_mut()?.pop() {
                Some(range) => return Some(range),
                None => drop(self.then.pop_front()),
            }
        }
    }

    /// Forgets a range and returns what it lacked.
    pub(super) fn take(&mut self, range: Range<u64>) -> Vec<Claim> {
        let mut taken = self.lacks.take(range.clone());
        taken.append(&mut self.late.take(range));
        taken
    }

    /// The process has moved a range.
    pub(super) fn shift(&mut self, from: u64, to: u64, bytes: u64) {
        let source = from..from.saturating_add(bytes);
        let (moved, late) = (self.lacks.take(source.clone()), self.late.take(source));
        self.take(to..to.saturating_add(bytes));
        for (claims, lacks) in [(moved, &mut self.lacks), (late, &mut self.late)] {
            for claim in claims {
                let at = to + (claim.to - from);
                lacks.put(at, at + claim.bytes, claim.from);
            }
        }
    }

    /// What is lacking from `address` on and can be put in place, without a
    /// gap, at most `bytes`.
    pub(super) fn at(&self, address: u64, bytes: u64) -> Option<Claim> {
        self.lacks.at(address, bytes)
    }

    /// The same of what was not on this host when last heard of.
    pub(super) fn late_at(&self, address: u64, bytes: u64) -> Option<Claim> {
        self.late.at(address, bytes)
    }

    /// Pages that are in store at `from`, and had this place when the tree was
    /// dumped, are on this host now. Those that have moved since are not found.
    pub(super) fn arrive(&mut self, place: Range<u64>, from: Range<u64>) {
        for claim in self.late.take(place) {
            let came = claim.from >= from.start && claim.from + claim.bytes <= from.end;
            let lacks = if came {
                &mut self.lacks
            } else {
                &mut self.late
            };
            lacks.put(claim.to, claim.to + claim.bytes, claim.from);
        }
    }

    /// Everything is on this host.
    pub(super) fn arrive_all(&mut self) {
        for (start, lack) in std::mem::take(&mut self.late.0) {
            self.lacks.put(start, lack.end, lack.from);
        }
    }

    /// Takes out the next part to put in place, at most `bytes`.
    pub(super) fn claim(&mut self, bytes: u64) -> Option<Claim> {
        let next = self.next(bytes)?;
        self.lacks.take(next.to..next.to + next.bytes);
        Some(next)
    }

    fn next(&mut self, bytes: u64) -> Option<Claim> {
        while let Some(range) = self.hurried() {
            let here = self.at(range.start, bytes).or_else(|| {
                let (&start, _) = self.lacks.0.range(range.clone()).next()?;
                self.at(start, bytes)
            });
            if let Some(mut claim) = here.filter(|claim| claim.to < range.end) {
                claim.bytes = claim.bytes.min(range.end - claim.to);
                self.first.push_front(claim.to + claim.bytes..range.end);
                return Some(claim);
            }
        }
        let start = *self
            .lacks
            .0
            .range(self.at..)
            .next()
            .or_else(|| self.lacks.0.first_key_value())?
            .0;
        let claim = self.at(start, bytes)?;
        self.at = start + claim.bytes;
        Some(claim)
    }

    /// Puts back what could not be put in place. It is on this host.
    pub(super) fn give_back(&mut self, claim: Claim) {
        self.take(claim.to..claim.to + claim.bytes);
        self.lacks.put(claim.to, claim.to + claim.bytes, claim.from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    use migrate_core::wire::PageOwner;
    use proptest::prelude::*;

    use crate::PAGE;
    use crate::mask::Mask;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u64, u64, u64),
        Take(u64, u64),
        Shift(u64, u64, u64),
        Claim(u64, bool),
        Hurry(u64, u64),
        InsertLate(u64, u64, u64),
        Arrive(u64, u64, u64),
        ArriveAll,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..64, 1u64..12, 0u64..64).prop_map(|(a, n, f)| Step::Insert(a, n, f)),
            (0u64..64, 0u64..12).prop_map(|(a, n)| Step::Take(a, n)),
            (0u64..64, 0u64..64, 1u64..12).prop_map(|(a, b, n)| Step::Shift(a, b, n)),
            (1u64..9, any::<bool>()).prop_map(|(n, back)| Step::Claim(n, back)),
            (0u64..64, 1u64..12).prop_map(|(a, n)| Step::Hurry(a, n)),
            (0u64..64, 1u64..12, 0u64..64).prop_map(|(a, n, f)| Step::InsertLate(a, n, f)),
            (0u64..64, 1u64..12, 0u64..64).prop_map(|(a, n, f)| Step::Arrive(a, n, f)),
            Just(Step::ArriveAll),
        ]
    }

    proptest! {
        /// A plan that is made at once is the one that is made piece by piece.
        #[test]
        fn a_plan_of_many_is_one_of_each(
            parts in prop::collection::vec((0u64..3, 0u64..4, 0u64..3, any::<bool>()), 0..30),
            sorted: bool,
        ) {
            let mut at = 0;
            let mut lacking: Vec<(Range<u64>, u64)> = parts
                .into_iter()
                .map(|(gap, count, shift, late)| {
                    at += gap;
                    let range = at..at + count;
                    at = range.end;
                    let from = range.start + shift;
                    (range, if late { LATE_FROM + from } else { from })
                })
                .collect();
            if !sorted {
                lacking.reverse();
            }
            let mut each = Plan::default();
            for (range, from) in lacking.clone() {
                each.insert(range, from);
            }
            let many = Plan::of(lacking);
            prop_assert_eq!(many.bytes(), each.bytes());
            for unit in 0..at {
                prop_assert_eq!(many.at(unit, 1), each.at(unit, 1));
                prop_assert_eq!(many.late_at(unit, 1), each.late_at(unit, 1));
            }
        }

        /// The plan says what a table of single units says.
        #[test]
        fn a_plan_is_a_table(steps in prop::collection::vec(step(), 1..60)) {
            let mut plan = Plan::default();
            let mut table: BTreeMap<u64, u64> = BTreeMap::new();
            // Those of them that are on this host.
            let mut here: BTreeSet<u64> = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Insert(at, count, from) => {
                        plan.insert(at..at + count, from);
                        for unit in 0..count {
                            table.insert(at + unit, from + unit);
                            here.insert(at + unit);
                        }
                    }
                    Step::InsertLate(at, count, from) => {
                        plan.insert(at..at + count, LATE_FROM + from);
                        for unit in 0..count {
                            table.insert(at + unit, LATE_FROM + from + unit);
                            here.remove(&(at + unit));
                        }
                    }
                    Step::Arrive(at, count, from) => {
                        let came = LATE_FROM + from..LATE_FROM + from + count;
                        let before = plan.clone();
                        plan.arrive(at..at + count, came.clone());
                        for unit in at..at + count {
                            // Nothing that has not come, and all of a whole lack.
                            if before.late_at(unit, 1).is_some() && plan.at(unit, 1).is_some() {
                                prop_assert!(came.contains(&table[&unit]));
                                here.insert(unit);
                            }
                        }
                    }
                    Step::ArriveAll => {
                        plan.arrive_all();
                        here.extend(table.keys());
                    }
                    Step::Take(at, count) => {
                        let taken: u64 = plan.take(at..at + count).iter().map(|claim| claim.bytes).sum();
                        let before = table.len() as u64;
                        table.retain(|unit, _| !(at..at + count).contains(unit));
                        prop_assert_eq!(taken, before - table.len() as u64);
                    }
                    Step::Shift(from, to, count) => {
                        plan.shift(from, to, count);
                        let moved: Vec<(u64, u64)> =
                            table.range(from..from + count).map(|(a, b)| (*a, *b)).collect();
                        let came: Vec<u64> = here.range(from..from + count).copied().collect();
                        here.retain(|unit| !(from..from + count).contains(unit) && !(to..to + count).contains(unit));
                        here.extend(came.into_iter().map(|unit| unit - from + to));
                        table.retain(|unit, _| !(from..from + count).contains(unit) && !(to..to + count).contains(unit));
                        table.extend(moved.into_iter().map(|(unit, source)| (unit - from + to, source)));
                    }
                    Step::Claim(count, back) => {
                        let claim = plan.claim(count);
                        prop_assert_eq!(claim.is_none(), here.is_empty());
                        if let Some(claim) = claim {
                            prop_assert!(claim.bytes >= 1 && claim.bytes <= count);
                            for unit in 0..claim.bytes {
                                prop_assert_eq!(table.get(&(claim.to + unit)), Some(&(claim.from + unit)));
                            }
                            if back {
                                plan.give_back(claim);
                            } else {
                                table.retain(|unit, _| !(claim.to..claim.to + claim.bytes).contains(unit));
                            }
                        }
                    }
                    Step::Hurry(at, count) => plan.hurry(at..at + count),
                }
                here.retain(|unit| table.contains_key(unit));
                prop_assert_eq!(plan.bytes(), table.len() as u64);
                for unit in 0..140 {
                    let (now, late) = (plan.at(unit, 1), plan.late_at(unit, 1));
                    prop_assert!(now.is_none() || late.is_none());
                    prop_assert_eq!(now.is_some(), here.contains(&unit));
                    prop_assert_eq!(now.or(late).map(|claim| claim.from), table.get(&unit).copied());
                }
            }
        }
    }

    #[test]
    fn what_is_in_a_hurry_comes_first() {
        let mut plan = Plan::default();
        plan.insert(0..100, 1000);
        plan.hurry(60..70);
        plan.hurry(200..300);
        plan.hurry(10..12);
        // Only addresses that are pages can be named like this.
        plan.insert(PAGE..4 * PAGE, 10 * PAGE);
        let mut pages = Mask::default();
        for page in [1, 2] {
            pages.set(page, true);
        }
        let owner = PageOwner::Task(1);
        plan.hurry_then(SomePages {
            owner,
            base: PAGE,
            pages,
        });
        plan.hurry_then(SomePages {
            owner,
            base: 9 * PAGE,
            pages,
        });
        let order: Vec<(u64, u64)> = std::iter::from_fn(|| plan.claim(PAGE))
            .map(|claim| (claim.to, claim.bytes))
            .collect();
        let expected = [
            (60, 10),
            (10, 2),
            (2 * PAGE, PAGE),
            (3 * PAGE, PAGE),
            (0, 10),
            (12, 48),
            (70, 30),
            (PAGE, PAGE),
        ];
        assert_eq!(order, expected);
    }
}
