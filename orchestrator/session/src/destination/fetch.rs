//! Memory that is still on the source when the copy begins to run: asked for as the
//! copy waits for it, taken in as it comes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use migrate_channel::{Frame, Receiver, Sender};
use migrate_core::late::{LateRuns, WANTED_RANGES_MAX};
use migrate_core::wire::{Message, PageDigest};
use migrate_memory::{LATE_LIMIT, LatePages, MemoryDigest};
use tokio::sync::{mpsc, watch};

use crate::error::Error;

/// What this side waits for.
const AWAITED: &str = "memory that is still on the source";

/// Pages after which the source is told how many have come: well below what it
/// lets be on their way.
const TOLD_EVERY_PAGES: u64 = 64;

/// Before the commit nothing is due; the steps of the migration have limits of
/// their own.
const BEFORE_LIMIT: Duration = Duration::from_secs(3600);

/// How often the source hears of this side while nothing is wanted: well within what it
/// waits for ([`LATE_LIMIT`]).
const SIGN_EVERY: Duration = Duration::from_secs(LATE_LIMIT.as_secs() / 6);

/// How often a thread that listens for a bell looks whether anybody still wants to
/// know.
const LISTEN_AT_ONCE: Duration = Duration::from_millis(500);

/// Hears when the copy waits for pages.
fn listen(pages: Arc<LatePages>) -> mpsc::Receiver<()> {
    let (rung, bell) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        while pages.missing() > 0 && !pages.is_lost() && !rung.is_closed() {
            match pages.await_wanted(LISTEN_AT_ONCE) {
                Ok(false) => {}
                // Nobody may want to know.
                Ok(true) if rung.blocking_send(()).is_ok() => {}
                Ok(true) => return,
                Err(error) => {
                    tracing::error!(error = %crate::error::chain(&error), "cannot hear what the copy waits for");
                    return;
                }
            }
        }
    });
    bell
}

/// What somebody who wants to compare compares with.
#[derive(Debug, Default)]
pub(super) struct Expected {
    /// Somebody has asked for it.
    pub(super) verify: bool,
    /// Digest of each task's late pages.
    pub(super) digests: Vec<PageDigest>,
    /// Areas that do not count.
    pub(super) masks: Vec<(u64, u32)>,
}

/// The pages of one copy and the way to them.
pub(super) struct Fetch {
    pub(super) peer: String,
    pub(super) pages: Arc<LatePages>,
    pub(super) runs: LateRuns,
    pub(super) link: (Sender, Receiver),
    pub(super) expected: Expected,
    /// The tree is this host's.
    pub(super) owned: watch::Receiver<bool>,
}

impl Fetch {
    /// Takes in all pages.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        self.link.0.set_deadline(LATE_LIMIT);
        let mut bell = listen(Arc::clone(&self.pages));
        let (mut came, mut told) = (0, 0);
        while self.pages.missing() > 0 {
            let limit = if *self.owned.borrow_and_update() {
                LATE_LIMIT
            } else {
                BEFORE_LIMIT
            };
            tokio::select! {
                frame = self.link.1.next(limit) => {
                    came += self.take(frame)?;
                    if came - told >= TOLD_EVERY_PAGES {
                        told = came;
                        self.say(&Message::Want { pages: Vec::new(), came }).await?;
                    }
                }
                rung = bell.recv() => {
                    if rung.is_none() {
                        return Err(super::receive::nothing("whoever hears what is awaited"));
                    }
                    let pages = self.pages.take_wanted(WANTED_RANGES_MAX);
                    if !pages.is_empty() {
                        told = came;
                        self.say(&Message::Want { pages, came }).await?;
                    }
                }
                changed = self.owned.changed() => {
                    if changed.is_err() {
                        return Err(super::receive::nothing("whoever wants this memory"));
                    }
                }
            }
        }
        let waited = self.pages.waited_faults();
        self.compared(came).await?;
        // The copy has all it needs, whether the source hears of it or not.
        if let Err(error) = self.say(&Message::Arrived { waited }).await {
            tracing::warn!(error = %error.chain(), "the source was not told that all memory has arrived");
        }
        // What is in the connection gets there before it ends.
        let _ = self.link.0.close().await;
        Ok(())
    }

    fn take(&self, frame: Result<Frame, migrate_channel::ChannelError>) -> Result<u64, Error> {
        let unexpected = |got: String| Error::Unexpected {
            peer: self.peer.clone(),
            got,
            awaited: AWAITED,
        };
        match frame {
            Ok(Frame::Pages { run, data }) if !data.is_empty() => {
                let number = self.runs.number_of(&run);
                let number = number.map_err(|error| unexpected(error.to_string()))?;
                self.pages
                    .arrive(number, &data)
                    .map_err(Error::file("keep", "memory that has come"))?;
                Ok(run.pages)
            }
            Ok(Frame::Control(message)) => {
                Err(crate::inbox::unexpected(&self.peer, &message, AWAITED))
            }
            Ok(_) => Err(unexpected("something else".to_owned())),
            Err(error) => Err(crate::inbox::broken(&self.peer, error, AWAITED)),
        }
    }

    async fn say(&mut self, message: &Message) -> Result<(), Error> {
        let said = self.link.0.control(message).await;
        said.map_err(|source| Error::Channel {
            peer: self.peer.clone(),
            source,
        })
    }

    /// Compares with what the frozen tree's memory amounted to, where somebody
    /// has asked for that. The source hears meanwhile that somebody is there.
    async fn compared(&mut self, came: u64) -> Result<(), Error> {
        let expected = std::mem::take(&mut self.expected);
        if !expected.verify {
            return Ok(());
        }
        let (pages, runs) = (Arc::clone(&self.pages), std::mem::take(&mut self.runs));
        let compare = move || expected.compare(&pages, &runs);
        let mut comparing = tokio::task::spawn_blocking(compare);
        loop {
            match tokio::time::timeout(SIGN_EVERY, &mut comparing).await {
                Ok(Ok(compared)) => return compared,
                Ok(Err(error)) => {
                    return Err(Error::Changed(format!("hashing memory failed: {error}")));
                }
                Err(_) => {
                    let pages = Vec::new();
                    // Nothing more is needed of the source.
                    let _ = self.say(&Message::Want { pages, came }).await;
                }
            }
        }
    }
}

impl Expected {
    fn compare(&self, pages: &LatePages, runs: &LateRuns) -> Result<(), Error> {
        let owners: BTreeSet<_> = runs.runs().iter().map(|run| run.owner).collect();
        super::receive::every_digest(&owners, &self.digests)?;
        for expected in &self.digests {
            let masks = [&self.masks[..], &expected.taken].concat();
            let mut digest = MemoryDigest::without(&masks);
            for run in runs.within(expected.owner, 0..u64::MAX) {
                let content = pages.content(run.first..run.first + run.pages);
                digest.add(
                    run.vaddr,
                    content.ok_or_else(|| super::receive::nothing("a page that has come"))?,
                );
            }
            if digest.finish() != expected.sha256 {
                return Err(Error::NotTheSame {
                    owner: expected.owner,
                });
            }
        }
        tracing::info!("the memory that came late is the tree's");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use migrate_channel::Connection;
    use migrate_core::wire::{PAGE_BYTES, PageOwner, PageRun};

    use super::*;

    /// One page, which comes, and then nobody is there any more.
    async fn the_last_that_came(expected: Expected) -> Result<(), Error> {
        let run = PageRun {
            owner: PageOwner::Task(7),
            vaddr: 1 << 20,
            pages: 1,
            flags: PageRun::PRESENT | PageRun::LAZY,
        };
        let mut runs = LateRuns::default();
        runs.add(&run).unwrap();
        let hello = crate::hello("m1");
        let (destination, mut source) = Connection::pair(hello.clone(), hello);
        let (_owned, owned) = watch::channel(true);
        let fetch = Fetch {
            peer: "host1".to_owned(),
            pages: Arc::new(LatePages::new(1).unwrap()),
            runs,
            link: (destination.sender, destination.receiver),
            expected,
            owned,
        };
        source.sender.pages(&run, &[7; PAGE_BYTES]).await.unwrap();
        source.sender.flush().await.unwrap();
        drop(source);
        fetch.run().await
    }

    #[tokio::test]
    async fn a_copy_that_has_everything_outlives_its_source() {
        the_last_that_came(Expected::default()).await.unwrap();
    }

    #[tokio::test]
    async fn another_content_is_told() {
        let expected = |byte| {
            let mut digest = MemoryDigest::without(&[]);
            digest.add(1 << 20, &[byte; PAGE_BYTES]);
            Expected {
                verify: true,
                digests: vec![PageDigest {
                    owner: PageOwner::Task(7),
                    sha256: digest.finish(),
                    taken: Vec::new(),
                }],
                masks: Vec::new(),
            }
        };
        the_last_that_came(expected(7)).await.unwrap();
        let other = the_last_that_came(expected(8)).await.unwrap_err();
        assert!(matches!(other, Error::NotTheSame { .. }), "{other:?}");
        let none = Expected {
            digests: Vec::new(),
            ..expected(7)
        };
        let unknown = the_last_that_came(none).await.unwrap_err();
        assert!(matches!(unknown, Error::NotCompared { .. }), "{unknown:?}");
    }
}
