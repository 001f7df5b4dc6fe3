//! Pages that come after the handover, for `--postcopy`.
//!
//! Both sides number them in the order in which CRIU's final list names them, so
//! a number means the same page on either. [`LateRuns`] is that numbering, and
//! [`Deliveries`] says in what order the source sends: what the copy waits for,
//! then the rest in order, each page once.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use thiserror::Error;

use crate::wire::{PAGE_BYTES, PageOwner, PageRun};

const PAGE: u64 = PAGE_BYTES as u64;

/// Numbers of pages that one [`Message::Want`](crate::wire::Message::Want) may
/// name, as ranges: what is beyond is asked for with the next one.
pub const WANTED_RANGES_MAX: usize = 1024;

/// Ranges of pages that one [`Message::Follows`](crate::wire::Message::Follows) may name:
/// with the largest numbers they fit a control message.
pub const FOLLOWING_RANGES_MAX: usize = 1 << 16;

/// Runs of pages that come late, at most: what is beyond goes over before the commit. Each
/// takes some 100 bytes on either side.
pub const RUNS_MAX: usize = 1 << 22;

/// Ranges of wanted pages that the source remembers. What is wanted beyond that
/// comes in its turn, for everything does.
const WANTED_MAX: usize = 1 << 16;

/// A run that cannot come late, as far as the list goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum LateError {
    /// The list names a page twice.
    #[error("page {vaddr:#x} of {owner:?} is to come late twice")]
    Twice {
        /// Whose.
        owner: PageOwner,
        /// The first page of the run.
        vaddr: u64,
    },
    /// The page is not one of them.
    #[error("page {vaddr:#x} of {owner:?} is none that is to come late")]
    Unknown {
        /// Whose.
        owner: PageOwner,
        /// The page.
        vaddr: u64,
    },
}

/// Pages side by side that come late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LateRun {
    /// Whose.
    pub owner: PageOwner,
    /// Address of the first.
    pub vaddr: u64,
    /// How many.
    pub pages: u64,
    /// Number of the first.
    pub first: u64,
}

impl LateRun {
    fn end(&self) -> u64 {
        self.vaddr + self.pages * PAGE
    }

    /// The addresses.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.vaddr..self.end()
    }

    /// Its part between two numbers, if there is one.
    #[must_use]
    pub fn part(&self, numbers: &Range<u64>) -> Option<Self> {
        let first = self.first.max(numbers.start);
        let end = (self.first + self.pages).min(numbers.end);
        (first < end).then(|| Self {
            vaddr: self.vaddr + (first - self.first) * PAGE,
            pages: end - first,
            first,
            ..*self
        })
    }
}

/// All pages that come late, with their numbers.
#[derive(Debug, Clone, Default)]
pub struct LateRuns {
    /// By number.
    runs: Vec<LateRun>,
    /// Their places in `runs`, by address. They come in that order as a rule.
    places: BTreeMap<PageOwner, Vec<usize>>,
}

impl LateRuns {
    /// How many pages there are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.last().map_or(0, |last| last.first + last.pages)
    }

    /// Takes in the next run of the list; the number of its first page.
    ///
    /// # Errors
    ///
    /// One of its pages was named before.
    pub fn add(&mut self, run: &PageRun) -> Result<u64, LateError> {
        let first = self.pages();
        let late = LateRun {
            owner: run.owner,
            vaddr: run.vaddr,
            pages: run.pages,
            first,
        };
        let places = self.places.entry(run.owner).or_default();
        let starts_before =
            |&place: &usize, end: u64| self.runs.get(place).is_some_and(|other| other.vaddr < end);
        let at = places.partition_point(|place| starts_before(place, late.end()));
        let clash = places[..at]
            .last()
            .and_then(|&place| self.runs.get(place))
            .is_some_and(|other| other.end() > run.vaddr);
        if clash {
            return Err(LateError::Twice {
                owner: run.owner,
                vaddr: run.vaddr,
            });
        }
        places.insert(at, self.runs.len());
        self.runs.push(late);
        Ok(first)
    }

    /// The runs, by number.
    #[must_use]
    pub fn runs(&self) -> &[LateRun] {
        &self.runs
    }

    /// The runs that a range of addresses touches, cut to it, in order.
    pub fn within(&self, owner: PageOwner, range: Range<u64>) -> impl Iterator<Item = LateRun> {
        let places = self.places.get(&owner).map_or(&[][..], Vec::as_slice);
        let runs = places.iter().filter_map(|&place| self.runs.get(place));
        let from = places.partition_point(|&place| {
            self.runs
                .get(place)
                .is_some_and(|run| run.end() <= range.start)
        });
        runs.skip(from)
            .take_while({
                let end = range.end;
                move |run| run.vaddr < end
            })
            .filter_map(move |run| {
                let skipped = range.start.saturating_sub(run.vaddr) / PAGE;
                let end = run.end().min(range.end);
                let kept = end.saturating_sub(run.vaddr) / PAGE;
                run.part(&(run.first + skipped..run.first + kept))
            })
    }

    /// The runs that a range of numbers touches, cut to it, in order.
    pub fn numbered(&self, numbers: Range<u64>) -> impl Iterator<Item = LateRun> {
        let start = self
            .runs
            .partition_point(|run| run.first + run.pages <= numbers.start);
        self.runs[start..]
            .iter()
            .map_while(move |run| run.part(&numbers))
    }

    /// The number of the first page of a run that has come.
    ///
    /// # Errors
    ///
    /// Not all of it is one run of the list, or part of one.
    pub fn number_of(&self, run: &PageRun) -> Result<u64, LateError> {
        let unknown = LateError::Unknown {
            owner: run.owner,
            vaddr: run.vaddr,
        };
        let bytes = run.pages.checked_mul(PAGE).ok_or(unknown)?;
        let end = run.vaddr.checked_add(bytes).ok_or(unknown)?;
        match self.within(run.owner, run.vaddr..end).next() {
            Some(part) if part.range() == (run.vaddr..end) => Ok(part.first),
            _ => Err(unknown),
        }
    }
}

/// What the source still has to send, and in which order.
#[derive(Debug, Clone)]
pub struct Deliveries {
    /// What was not handed out yet, by the first number; the end.
    left: BTreeMap<u64, u64>,
    wanted: VecDeque<Range<u64>>,
    left_pages: u64,
}

impl Deliveries {
    /// All of so many pages.
    #[must_use]
    pub fn of(pages: u64) -> Self {
        Self {
            left: (pages > 0).then_some((0, pages)).into_iter().collect(),
            wanted: VecDeque::new(),
            left_pages: pages,
        }
    }

    /// Pages that were not handed out yet.
    #[must_use]
    pub fn left_pages(&self) -> u64 {
        self.left_pages
    }

    /// The copy waits for these. What has been handed out is on its way, and
    /// what there is not is nobody's to ask for.
    pub fn want(&mut self, numbers: Range<u64>) {
        if self.wanted.len() < WANTED_MAX && numbers.start < numbers.end {
            self.wanted.push_back(numbers);
        }
    }

    /// The next to send, at most so many; none when all are handed out.
    pub fn next(&mut self, pages_max: u64) -> Option<Range<u64>> {
        if let Some(part) = self.next_wanted(pages_max) {
            return Some(part);
        }
        let (&start, &end) = self.left.first_key_value()?;
        let part = start..end.min(start.saturating_add(pages_max.max(1)));
        self.take(&part);
        Some(part)
    }

    /// Whether the next is one that the copy waits for.
    /// What was wanted and is on its way by now is forgotten.
    #[must_use]
    pub fn is_wanted(&mut self) -> bool {
        while let Some(wanted) = self.wanted.front() {
            if self.first_within(wanted).is_some() {
                return true;
            }
            self.wanted.pop_front();
        }
        false
    }

    /// The next that the copy waits for, at most so many.
    pub fn next_wanted(&mut self, pages_max: u64) -> Option<Range<u64>> {
        let pages_max = pages_max.max(1);
        while let Some(wanted) = self.wanted.pop_front() {
            if let Some(part) = self.first_within(&wanted) {
                let part = part.start..part.end.min(part.start.saturating_add(pages_max));
                if part.end < wanted.end {
                    self.wanted.push_front(part.end..wanted.end);
                }
                self.take(&part);
                return Some(part);
            }
        }
        None
    }

    fn first_within(&self, numbers: &Range<u64>) -> Option<Range<u64>> {
        let from = self
            .left
            .range(..=numbers.start)
            .next_back()
            .filter(|&(_, &end)| end > numbers.start)
            .map_or(numbers.start, |(&start, _)| start);
        let (&start, &end) = self.left.range(from..numbers.end).next()?;
        Some(start.max(numbers.start)..end.min(numbers.end))
    }

    /// `part` lies within one entry.
    fn take(&mut self, part: &Range<u64>) {
        let Some((&start, &end)) = self.left.range(..=part.start).next_back() else {
            return;
        };
        self.left.remove(&start);
        if start < part.start {
            self.left.insert(start, part.start);
        }
        if part.end < end {
            self.left.insert(part.end, end);
        }
        self.left_pages -= part.end - part.start;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TASK: PageOwner = PageOwner::Task(7);

    fn run(owner: PageOwner, page: u64, pages: u64) -> PageRun {
        PageRun {
            owner,
            vaddr: page * PAGE,
            pages,
            flags: 0,
        }
    }

    #[test]
    fn pages_are_numbered_in_the_order_of_the_list() {
        let mut runs = LateRuns::default();
        assert_eq!(runs.add(&run(TASK, 10, 4)), Ok(0));
        assert_eq!(runs.add(&run(TASK, 14, 2)), Ok(4));
        assert_eq!(runs.add(&run(PageOwner::Task(3), 12, 5)), Ok(6));
        assert_eq!(runs.pages(), 11);
        assert_eq!(runs.number_of(&run(TASK, 12, 2)), Ok(2));
        assert_eq!(runs.number_of(&run(PageOwner::Task(3), 12, 5)), Ok(6));
        // Two runs, the end of one, and nobody's.
        for (owner, page, pages) in [(TASK, 13, 2), (TASK, 15, 2), (TASK, 9, 1), (TASK, 0, 0)] {
            assert!(runs.number_of(&run(owner, page, pages)).is_err(), "{page}");
        }
        assert!(runs.number_of(&run(TASK, 10, u64::MAX)).is_err());
        let parts: Vec<(u64, u64, u64)> = runs
            .within(TASK, 12 * PAGE..15 * PAGE)
            .map(|part| (part.vaddr / PAGE, part.pages, part.first))
            .collect();
        assert_eq!(parts, [(12, 2, 2), (14, 1, 4)]);
        let parts: Vec<(u64, u64)> = runs
            .numbered(3..8)
            .map(|part| (part.vaddr / PAGE, part.pages))
            .collect();
        assert_eq!(parts, [(13, 1), (14, 2), (12, 2)]);
    }

    #[test]
    fn a_page_that_is_named_twice_is_refused() {
        let mut runs = LateRuns::default();
        runs.add(&run(TASK, 10, 4)).unwrap();
        for (page, pages) in [(10, 4), (8, 3), (13, 1), (8, 20), (12, 9)] {
            assert!(runs.add(&run(TASK, page, pages)).is_err(), "{page}");
        }
        assert!(runs.add(&run(TASK, 8, 2)).is_ok());
        assert!(runs.add(&run(PageOwner::Task(8), 10, 4)).is_ok());
        assert_eq!(runs.pages(), 10);
    }

    #[test]
    fn what_the_copy_waits_for_comes_first() {
        let mut left = Deliveries::of(100);
        assert_eq!(left.next(10), Some(0..10));
        left.want(50..60);
        left.want(5..12);
        left.want(900..901);
        assert!(left.is_wanted());
        assert_eq!(left.next(8), Some(50..58));
        assert_eq!(left.next(8), Some(58..60));
        assert_eq!(left.next(8), Some(10..12));
        assert!(!left.is_wanted());
        assert_eq!(left.next_wanted(8), None);
        assert_eq!(left.next(8), Some(12..20));
        assert_eq!(left.left_pages(), 70);
    }

    proptest! {
        /// Every page goes out once, whatever is wanted meanwhile.
        #[test]
        fn each_page_is_handed_out_once(
            pages in 0u64..200,
            steps in prop::collection::vec((0u64..220, 0u64..40, 1u64..30), 0..80),
        ) {
            let mut left = Deliveries::of(pages);
            let mut seen = vec![0; usize::try_from(pages).unwrap()];
            let mut steps = steps.into_iter();
            loop {
                let (start, count, most) = steps.next().unwrap_or((0, 0, 16));
                left.want(start..start + count);
                let Some(part) = left.next(most) else { break };
                prop_assert!(part.start < part.end && part.end - part.start <= most);
                for page in part {
                    seen[usize::try_from(page).unwrap()] += 1;
                }
                let handed_out: u64 = seen.iter().sum();
                prop_assert_eq!(left.left_pages(), pages - handed_out);
            }
            prop_assert!(seen.iter().all(|&times| times == 1));
        }
    }
}
