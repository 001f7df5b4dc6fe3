//! The page store against a model of it: a map from page to one byte.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::ops::Range;

use migrate_core::wire::{PAGE_BYTES, PageOwner, PageRun};
use migrate_memory::{Content, Held, MemoryDigest, PageStore, StoreError};
use proptest::prelude::*;

const PAGE: u64 = PAGE_BYTES as u64;

/// Three extents and a bit, beginning in the middle of one.
const FIRST_PAGE: u64 = 700;
const PAGES: u64 = 1300;

fn run(owner: PageOwner, page: u64, pages: u64, flags: u32) -> PageRun {
    PageRun {
        owner,
        vaddr: page * PAGE,
        pages,
        flags,
    }
}

/// Pages of one byte each; zero stands for a page of zeros.
fn content(bytes: &[u8]) -> Vec<u8> {
    bytes
        .iter()
        .flat_map(|&byte| {
            // Only the last byte tells the page from zeros.
            let mut page = vec![0; PAGE_BYTES];
            page[PAGE_BYTES - 1] = byte;
            page
        })
        .collect()
}

#[derive(Debug, Clone)]
enum Step {
    Put(PageOwner, u64, Vec<u8>),
    Zero(PageOwner, u64, u64),
    Drop(PageOwner, Range<u64>),
    Retain(PageOwner, Vec<Range<u64>>),
    DropOwner(PageOwner),
}

fn owner() -> impl Strategy<Value = PageOwner> {
    prop_oneof![Just(PageOwner::Task(7)), Just(PageOwner::Shared(7))]
}

fn pages() -> impl Strategy<Value = Range<u64>> {
    (FIRST_PAGE..FIRST_PAGE + PAGES, 1u64..600).prop_map(|(start, count)| start..start + count)
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 1..600);
    let dense = (200usize..600, 1..=u8::MAX).prop_map(|(pages, byte)| vec![byte; pages]);
    prop_oneof![
        2 => (owner(), FIRST_PAGE..FIRST_PAGE + PAGES, dense)
            .prop_map(|(owner, page, bytes)| Step::Put(owner, page, bytes)),
        6 => (owner(), FIRST_PAGE..FIRST_PAGE + PAGES, bytes)
            .prop_map(|(owner, page, bytes)| Step::Put(owner, page, bytes)),
        2 => (owner(), pages()).prop_map(|(owner, p)| Step::Zero(owner, p.start, p.end - p.start)),
        2 => (owner(), pages()).prop_map(|(owner, p)| Step::Drop(owner, p)),
        1 => (owner(), prop::collection::btree_set(FIRST_PAGE..FIRST_PAGE + PAGES, 0..6))
            .prop_map(|(owner, edges)| {
                let edges: Vec<u64> = edges.into_iter().collect();
                let kept = edges.chunks_exact(2).map(|edge| edge[0]..edge[1]).collect();
                Step::Retain(owner, kept)
            }),
        1 => owner().prop_map(Step::DropOwner),
    ]
}

type Model = BTreeMap<(PageOwner, u64), u8>;

fn apply(step: &Step, store: &mut PageStore, model: &mut Model) {
    match step {
        Step::Put(owner, page, bytes) => {
            let run = run(*owner, *page, bytes.len() as u64, PageRun::PRESENT);
            store.put(run, &content(bytes)).unwrap();
            for (at, &byte) in (*page..).zip(bytes) {
                model.insert((*owner, at), byte);
            }
        }
        Step::Zero(owner, page, pages) => {
            store
                .put(run(*owner, *page, *pages, PageRun::ZERO), &[])
                .unwrap();
            for at in *page..page + pages {
                model.insert((*owner, at), 0);
            }
        }
        Step::Drop(owner, pages) => {
            store.drop_range(*owner, pages.start * PAGE..pages.end * PAGE);
            model.retain(|(whose, page), _| whose != owner || !pages.contains(page));
        }
        Step::Retain(owner, kept) => {
            let entries: Vec<PageRun> = kept
                .iter()
                .map(|pages| run(*owner, pages.start, pages.end - pages.start, 1))
                .collect();
            store.retain(*owner, &entries);
            model.retain(|(whose, page), _| {
                whose != owner || kept.iter().any(|pages| pages.contains(page))
            });
        }
        Step::DropOwner(owner) => {
            store.drop_owner(*owner);
            model.retain(|(whose, _), _| whose != owner);
        }
    }
}

fn check(store: &PageStore, model: &Model) {
    for owner in [PageOwner::Task(7), PageOwner::Shared(7)] {
        let expected: Vec<(u64, u8)> = model
            .range((owner, 0)..=(owner, u64::MAX))
            .map(|(&(_, page), &byte)| (page, byte))
            .collect();
        let listed = |pieces: Vec<migrate_memory::Piece<'_>>| -> Vec<(u64, u8)> {
            pieces
                .iter()
                .flat_map(|piece| {
                    let bytes = match piece.content {
                        Content::Zero(pages) => vec![0; usize::try_from(pages).unwrap()],
                        Content::Data(data) => data
                            .chunks(PAGE_BYTES)
                            .map(|page| page[PAGE_BYTES - 1])
                            .collect(),
                    };
                    (piece.vaddr / PAGE..).zip(bytes)
                })
                .collect()
        };
        assert_eq!(listed(store.pages(owner).collect()), expected);
        let part = (FIRST_PAGE + 100)..(FIRST_PAGE + 900);
        let within: Vec<(u64, u8)> = expected
            .iter()
            .copied()
            .filter(|(page, _)| part.contains(page))
            .collect();
        let range = part.start * PAGE..part.end * PAGE;
        assert_eq!(listed(store.range(owner, range).collect()), within);

        let whole = [run(owner, FIRST_PAGE - 10, PAGES + 800, 1)];
        let mut at = FIRST_PAGE - 10;
        let mut last = None;
        for holding in store.resolve(&whole) {
            assert_eq!(holding.run.vaddr, at * PAGE);
            assert_ne!(last, Some(holding.held), "parts are as long as they can be");
            last = Some(holding.held);
            for page in at..at + holding.run.pages {
                let expected = match model.get(&(owner, page)) {
                    None => Held::Missing,
                    Some(0) => Held::Zero,
                    Some(_) => Held::Data,
                };
                assert_eq!(holding.held, expected, "page {page}");
                let held = store
                    .page(owner, page * PAGE)
                    .map(|bytes| bytes[PAGE_BYTES - 1]);
                assert_eq!(held, model.get(&(owner, page)).copied());
            }
            at += holding.run.pages;
        }
        assert_eq!(at, FIRST_PAGE - 10 + PAGES + 800);
    }
    let nonzero = model.values().filter(|&&byte| byte != 0).count() as u64;
    assert!(store.held_bytes() >= nonzero * PAGE);
    if model.is_empty() {
        assert_eq!(store.held_bytes(), 0);
        assert_eq!(store.owners().count(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_steps_lead_to_what_the_model_has(steps in prop::collection::vec(step(), 1..12)) {
        let mut store = PageStore::new(u64::MAX);
        let mut model = Model::new();
        for step in &steps {
            apply(step, &mut store, &mut model);
            check(&store, &model);
        }
        for owner in [PageOwner::Task(7), PageOwner::Shared(7)] {
            let mut digest = MemoryDigest::new();
            for (&(_, page), &byte) in model.range((owner, 0)..=(owner, u64::MAX)) {
                digest.add(page * PAGE, &content(&[byte]));
            }
            prop_assert_eq!(store.digest(owner, &[]), digest.finish());
            store.drop_owner(owner);
        }
        check(&store, &Model::new());
    }

    #[test]
    fn impossible_runs_are_refused(
        vaddr: u64, pages: u64, flags in 0u32..8, data in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut store = PageStore::new(1 << 20);
        let run = PageRun { owner: PageOwner::Task(1), vaddr, pages, flags };
        prop_assert!(store.put(run, &data).is_err());
        store.drop_range(PageOwner::Task(1), vaddr..vaddr.saturating_add(pages));
        store.retain(PageOwner::Task(1), &[run]);
        prop_assert_eq!(store.held_bytes(), 0);
    }
}

#[test]
fn the_bound_is_exact_and_zeros_are_free() {
    let owner = PageOwner::Task(1);
    let mut store = PageStore::new(3 * PAGE);
    store
        .put(run(owner, 10, 2, PageRun::PRESENT), &content(&[1, 2]))
        .unwrap();
    store
        .put(run(owner, 1 << 20, 1 << 20, PageRun::ZERO), &[])
        .unwrap();
    store
        .put(run(owner, 40, 3, PageRun::PRESENT), &content(&[0, 0, 0]))
        .unwrap();
    assert_eq!(store.held_bytes(), 2 * PAGE);
    // Replacing costs nothing.
    store
        .put(run(owner, 10, 2, PageRun::PRESENT), &content(&[3, 4]))
        .unwrap();
    store
        .put(run(owner, 5000, 1, PageRun::PRESENT), &content(&[5]))
        .unwrap();
    assert_eq!(store.held_bytes(), 3 * PAGE);
    let full = store.put(run(owner, 12, 1, PageRun::PRESENT), &content(&[6]));
    assert_eq!(
        full,
        Err(StoreError::Full {
            limit_bytes: 3 * PAGE
        })
    );
    assert!(full.unwrap_err().help().is_some());
    // Room again when an extent is empty.
    store.drop_range(owner, 5000 * PAGE..5001 * PAGE);
    store
        .put(run(owner, 12, 1, PageRun::PRESENT), &content(&[6]))
        .unwrap();
    assert_eq!(store.page(owner, 12 * PAGE).unwrap()[PAGE_BYTES - 1], 6);
}

#[test]
fn a_run_says_what_it_is() {
    let owner = PageOwner::Task(1);
    let mut store = PageStore::new(u64::MAX);
    let one = content(&[1]);
    for (flags, data, malformed) in [
        (1, &[][..], false),
        (0, &[], false),
        (PageRun::PRESENT, &one[1..], true),
        (PageRun::ZERO, &one, true),
        (PageRun::ZERO | PageRun::PRESENT, &one, true),
    ] {
        let error = store.put(run(owner, 1, 1, flags), data).unwrap_err();
        assert_eq!(
            matches!(error, StoreError::Malformed { .. }),
            malformed,
            "{error}"
        );
    }
    assert_eq!(store.owners().count(), 0);
}

#[test]
fn a_digest_knows_addresses_and_content_only() {
    let owner = PageOwner::Task(1);
    let mut once = PageStore::new(u64::MAX);
    once.put(run(owner, 511, 3, PageRun::PRESENT), &content(&[1, 0, 2]))
        .unwrap();
    let mut pieces = PageStore::new(u64::MAX);
    pieces
        .put(run(owner, 513, 1, PageRun::PRESENT), &content(&[2]))
        .unwrap();
    pieces
        .put(run(owner, 511, 1, PageRun::PRESENT), &content(&[9]))
        .unwrap();
    pieces
        .put(run(owner, 511, 1, PageRun::PRESENT), &content(&[1]))
        .unwrap();
    pieces.put(run(owner, 900, 4, PageRun::ZERO), &[]).unwrap();
    assert_eq!(once.digest(owner, &[]), pieces.digest(owner, &[]));
    pieces
        .put(run(owner, 512, 1, PageRun::PRESENT), &content(&[3]))
        .unwrap();
    assert_ne!(once.digest(owner, &[]), pieces.digest(owner, &[]));
    assert_ne!(
        once.digest(owner, &[]),
        once.digest(PageOwner::Task(2), &[])
    );
}

#[test]
fn masked_areas_do_not_count() {
    let owner = PageOwner::Task(1);
    let at = |vaddr| PageRun {
        owner,
        vaddr,
        pages: 1,
        flags: PageRun::PRESENT,
    };
    let digest = |bytes: &[(usize, u8)], masks: &[(u64, u32)]| {
        let mut store = PageStore::new(1 << 20);
        let mut page = [7; PAGE_BYTES];
        for &(offset, byte) in bytes {
            page[offset] = byte;
        }
        store.put(at(0x1000), &page).unwrap();
        store.put(at(0x2000), &page).unwrap();
        store.digest(owner, masks)
    };
    // Across the end of the first page.
    let masks = [(0x1ff8, 16)];
    let plain = digest(&[], &masks);
    assert_eq!(
        digest(
            &[(0xff8, 1), (0xfff, 2), (0, 3), (7, 4)],
            &[(0x1ff8, 16), (0x1000, 8), (0x2ff8, 8)]
        ),
        digest(&[], &[(0x1ff8, 16), (0x1000, 8), (0x2ff8, 8)])
    );
    assert_ne!(digest(&[(0xff7, 1)], &masks), plain);
    assert_ne!(digest(&[(8, 1)], &masks), plain);
    assert_ne!(digest(&[], &[]), plain);
    // In any order, over each other, to the end of all addresses, in large ones.
    let odd = [(0x1ffc, 12), (u64::MAX - 7, u32::MAX), (0x1ff8, 8), (0, 0)];
    assert_eq!(digest(&[], &odd), plain);
    assert_eq!(
        digest(&[(5, 5)], &[(0, u32::MAX)]),
        digest(&[], &[(0, u32::MAX)])
    );
    assert_eq!(
        digest(&[], &[(0x1000, 0x2000)]),
        MemoryDigest::new().finish()
    );
}
