//! The destination's side of a migration: one connection, one tree.
//!
//! [`serve`] does what the table of [`migrate_core::protocol::destination`] says,
//! step by step. Until `Owned` is on record everything is undone when the
//! connection ends, whatever the reason; after it nothing is.

pub(crate) mod claims;
mod clock;
mod fetch;
mod lazy;
mod preflight;
mod prepare;
mod receive;
mod takeover;
mod tracking;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_channel::{ChannelError, Connection, Further, Receiver, Sender};
use migrate_core::Flow;
use migrate_core::facts::TreeFacts;
use migrate_core::journal::{Side, Stage};
use migrate_core::policy::Policy;
use migrate_core::protocol::destination::{Event, Step};
use migrate_core::protocol::{IllegalTransition, Machine as _};
use migrate_core::wire::{Message, NetworkLock, RestoreChoice, StdioChoice};
use migrate_criu::{Criu, CriuError, ImageDir, Notice, ParkedRestore, Session};
use migrate_gate::{Gate, HeldPacket, HeldPackets};
use migrate_net::{Net, Placement, Staged};
use migrate_proc::{Adoption, Home, Precedence};

use self::clock::Clock;
use crate::cancel::Cancel;
use crate::error::Error;
use crate::figures;
use crate::guard::Guard;
use crate::images::ImagePlace;
use crate::inbox::Inbox;
use crate::journal::{self, Journal};
use crate::state::State;

pub use lazy::keep_memory;
pub(crate) use receive::Memory;

/// How the destination's part ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// The tree runs here.
    Running,
    /// The tree lies on a disk here, for the host that it comes from.
    Kept,
    /// The source only wanted to check, or to know the verdict, or what is kept
    /// here.
    Asked,
}

/// The longest silence of the source outside the blackout. It examines its
/// tree or asks its user within this time.
pub(crate) const SILENCE: Duration = Duration::from_secs(60);

/// Questions whether a tree fits here that one connection may ask: a source asks
/// one. Each takes this host a look at its processes, files and sockets and a run
/// of CRIU, so nobody may ask for ever.
const QUESTIONS_MAX: u32 = 4;

/// How many of those one connection has asked.
#[derive(Debug, Default)]
pub(crate) struct Questions(u32);

impl Questions {
    /// Counts another one.
    ///
    /// # Errors
    /// It is one too many.
    pub(crate) fn another(&mut self, peer: &str) -> Result<(), Error> {
        self.0 += 1;
        if self.0 > QUESTIONS_MAX {
            return Err(Error::TooManyQuestions {
                peer: peer.to_owned(),
                most: QUESTIONS_MAX,
            });
        }
        Ok(())
    }
}

/// Serves one connection: a tree that moves here, or is to be kept here for the host
/// that it comes from, or a question about one that is.
///
/// # Errors
///
/// The tree was not taken over, and everything here has been undone; or, after
/// [`Error::LostAfterCommit`], it was taken over and could not be run.
pub async fn serve(
    mut connection: Connection,
    policy: Arc<Policy>,
    cancel: Cancel,
) -> Result<Served, Error> {
    let state = State::open()?;
    let first = tokio::select! {
        first = connection.receiver.control(SILENCE) => first,
        () = cancel.cancelled() => return Err(Error::Stopped),
    };
    match first {
        Ok(Message::Keep(order)) => crate::park::keep(connection, *order, policy, cancel).await,
        Ok(Message::Kept(question)) => crate::park::answer(connection, question, &policy).await,
        first => {
            let mut side = Destination::new(state, connection, policy, cancel.clone());
            side.first = Some(first);
            serve_side(side, cancel).await
        }
    }
}

/// Serves a tree that comes back to this host. Its addresses are here, and the
/// gate that was left for it is taken away when the tree is about to run. It is
/// root who brings it back, so no policy is in the way.
///
/// # Errors
///
/// As [`serve`].
pub(crate) async fn serve_parked(
    connection: Connection,
    cancel: Cancel,
    gate: String,
) -> Result<Served, Error> {
    let state = State::open()?;
    let mut side = Destination::new(state, connection, Arc::default(), cancel.clone());
    side.parked = Some(gate);
    serve_side(side, cancel).await
}

async fn serve_side(mut side: Destination, cancel: Cancel) -> Result<Served, Error> {
    let _under_way = figures::UnderWay::begin();
    let mut failed = None;
    while !side.step.is_end() {
        let step = side.step;
        let came = if step.may_be_dropped() {
            tokio::select! {
                came = side.perform(step) => came,
                () = cancel.cancelled() => Err(Error::Stopped),
            }
        } else {
            side.perform(step).await
        };
        let event = match came {
            Ok(event) => event,
            Err(error) => {
                side.tell_failure(&error).await;
                failed = Some(error);
                Event::Failed
            }
        };
        side.follow(event)?;
    }
    // A peer that is gone needs no farewell.
    let _ = side.sender.close().await;
    let error = failed.unwrap_or_else(|| receive::nothing("a reason"));
    match side.step {
        Step::Running => Ok(Served::Running),
        Step::Answered => Ok(Served::Asked),
        Step::Abandoned => {
            figures::ended(figures::Outcome::Abandoned);
            Err(Error::LostAfterCommit(Box::new(error)))
        }
        _ => {
            figures::ended(figures::Outcome::Undone);
            Err(error)
        }
    }
}

/// What the source has told about the tree.
struct Order {
    tree: TreeFacts,
    stdio: StdioChoice,
    placements: Vec<Placement>,
    /// The unit that is to take the tree once it runs.
    adoption: Adoption,
}

/// How the source wants its tree to be taken.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    blackout_limit: Duration,
    verify: bool,
    streams: u32,
    restore: RestoreChoice,
    lock: NetworkLock,
    /// Memory may come after the commit.
    postcopy: bool,
}

/// CRIU's part, which changes from a restore that waits for images to one that
/// is held.
enum Engine {
    None,
    Parked(ParkedRestore),
    Held(Session),
}

/// Where frames come from: raw while pages are streamed, by a task afterwards.
enum Incoming {
    Frames(Receiver),
    Messages(Inbox),
    Closed,
}

/// Everything this side has done so far; a field that is set is an effect in
/// force, and [`Destination::undo`] is the undo of each.
struct Destination {
    state: State,
    /// What may be restored here.
    policy: Arc<Policy>,
    peer: String,
    migration_id: String,
    /// Somebody wants this side to come to its end.
    stop: Cancel,
    sender: Sender,
    /// The way to further connections, until they are there.
    further: Option<Further>,
    incoming: Incoming,
    /// What came over it, and was looked at to tell what this is about.
    first: Option<Result<Message, ChannelError>>,
    /// Where it stands; only [`Destination::follow`] changes it.
    step: Step,
    order: Option<Order>,
    /// What the source has asked for with `Prepare`.
    wanted: Option<Wanted>,
    /// When the ownership was on record.
    go_at: Option<Instant>,
    clock: Clock,
    /// What was held when egress opened, and waits for live sockets.
    waiting: Vec<HeldPacket>,
    net: Option<Net>,
    criu: Option<Criu>,
    dumped_at: Option<Instant>,
    /// The gate that waits for the tree, when it has been on this host before.
    parked: Option<String>,

    // Effects, in the order in which they come about.
    journal: Option<Journal>,
    guard: Option<Guard>,
    gate: Option<Gate>,
    held: Option<HeldPackets>,
    /// Connections that the tree has closed, and whether their peers may still
    /// have to close them.
    ended: BTreeMap<Flow, bool>,
    tracked: tracking::Made,
    /// While the tree stands still.
    precedence: Option<Precedence>,
    staged: Vec<Staged>,
    images: Option<ImageDir>,
    /// Where they are; declared after them, for it goes after them.
    place: Option<ImagePlace>,
    home: Option<Home>,
    /// The end of the tunnel device, until a CRIU that runs has it. A device
    /// gives a second end to nobody, so each CRIU gets a duplicate of this one.
    tunnel: Option<OwnedFd>,
    /// Memory that arrives while the copy runs.
    lazy: lazy::Memory,
    /// Keys of files that lead out of the tree, in the order of the worker's inherited fds.
    streams: Vec<String>,
    engine: Engine,
}

impl Destination {
    fn new(state: State, connection: Connection, policy: Arc<Policy>, stop: Cancel) -> Self {
        Self {
            state,
            policy,
            peer: connection.hello.hostname.clone(),
            migration_id: connection.hello.migration_id.clone(),
            stop,
            sender: connection.sender,
            further: Some(connection.further),
            incoming: Incoming::Frames(connection.receiver),
            first: None,
            step: Step::Listen,
            order: None,
            wanted: None,
            go_at: None,
            clock: Clock::default(),
            waiting: Vec::new(),
            net: None,
            criu: None,
            dumped_at: None,
            parked: None,
            journal: None,
            guard: None,
            gate: None,
            held: None,
            ended: BTreeMap::new(),
            tracked: tracking::Made::new(),
            precedence: None,
            staged: Vec::new(),
            images: None,
            place: None,
            home: None,
            tunnel: None,
            lazy: lazy::Memory::default(),
            streams: Vec::new(),
            engine: Engine::None,
        }
    }

    /// Does what a step stands for, and says what came of it; an error is
    /// [`Event::Failed`].
    async fn perform(&mut self, step: Step) -> Result<Event, Error> {
        match step {
            Step::Listen => return self.listen().await,
            Step::Prepare => {
                let Wanted {
                    streams,
                    restore,
                    lock,
                    postcopy,
                    ..
                } = self.wanted()?;
                self.prepare(streams, restore, lock, postcopy).await?;
                crate::pause::at("prepared");
            }
            Step::Receive => {
                let Wanted {
                    blackout_limit,
                    verify,
                    postcopy,
                    ..
                } = self.wanted()?;
                self.receive(blackout_limit, verify, postcopy).await?;
                crate::pause::at("received");
            }
            Step::Restore => {
                self.restore().await?;
                crate::pause::at("restored");
            }
            Step::AwaitGo => self.await_go(self.wanted()?.blackout_limit).await?,
            Step::Own => self.own()?,
            Step::Open => self.open().await?,
            Step::Note => self.note()?,
            Step::Resume => self.resume().await?,
            Step::Close => self.close().await?,
            Step::Undo => {
                for leftover in self.undo().await {
                    tracing::error!("{leftover}");
                }
            }
            Step::Abandon => {
                // A copy that has provably not run goes back; else the record
                // stays as it is.
                self.engine = Engine::None;
                crate::recover::abandoned(&self.migration_id).await;
                // Should it run all the same, it needs all its memory.
                if let Err(error) = std::mem::take(&mut self.lazy).abandoned().await {
                    tracing::error!(error = %error.chain(), "the copy's memory has not come");
                }
            }
            Step::Answered | Step::Running | Step::Undone | Step::Abandoned => {}
        }
        Ok(Event::Done)
    }

    /// Moves on to the next step.
    fn follow(&mut self, event: Event) -> Result<(), IllegalTransition> {
        self.clock.ended(self.step.name());
        self.step = self.step.on(event)?;
        Ok(())
    }

    fn wanted(&self) -> Result<Wanted, Error> {
        self.wanted.ok_or_else(|| receive::nothing("the order"))
    }

    /// Told before the undoing, for the source's tree may stand still. Its end
    /// waits for the end of the connection, so that the same command succeeds
    /// at once.
    async fn tell_failure(&mut self, error: &Error) {
        let phase = self.step.phase();
        tracing::warn!(error = %error.chain(), %phase, "the migration failed here");
        let failed = error.as_message(phase, crate::hostname());
        let _ = self.sender.control(&failed).await;
    }

    /// Examines and answers until the source wants its tree taken, or no more.
    async fn listen(&mut self) -> Result<Event, Error> {
        journal::check_name(&self.peer, &self.migration_id)?;
        let mut questions = Questions::default();
        loop {
            match self.message("what the source wants", SILENCE).await? {
                Message::Preflight {
                    tree,
                    source,
                    stdio,
                    adopt,
                } => {
                    questions.another(&self.peer)?;
                    self.preflight(*tree, &source, stdio, adopt).await?;
                }
                Message::Verdict { migration_id } => {
                    journal::check_name(&self.peer, &migration_id)?;
                    self.settle(&migration_id).await?;
                    let stage = journal::verdict(&self.state, &migration_id)?;
                    self.send(&Message::VerdictIs(stage)).await?;
                    return Ok(Event::Asked);
                }
                Message::Abort { .. } => return Ok(Event::Asked),
                Message::Prepare {
                    blackout_limit_ms,
                    verify,
                    streams,
                    restore,
                    lock,
                    postcopy,
                } => {
                    self.wanted = Some(Wanted {
                        blackout_limit: Duration::from_millis(blackout_limit_ms),
                        verify,
                        streams,
                        restore,
                        lock,
                        postcopy,
                    });
                    return Ok(Event::Done);
                }
                other => return Err(self.unexpected(&other, "what the source wants")),
            }
        }
    }

    /// What a dead agent has left decides itself before its record is asked.
    async fn settle(&self, migration_id: &str) -> Result<(), Error> {
        let record = journal::read(&self.state, migration_id, Side::Destination)?;
        if let Some(record) = record
            && !crate::sweep::owner_alive(&record)
        {
            crate::recover::settle(&self.state, &record, None)
                .await
                .log();
        }
        Ok(())
    }

    async fn send(&mut self, message: &Message) -> Result<(), Error> {
        self.sender
            .control(message)
            .await
            .map_err(|source| Error::Channel {
                peer: self.peer.clone(),
                source,
            })
    }

    /// The next message, whatever way messages come at the moment.
    async fn message(&mut self, awaited: &'static str, limit: Duration) -> Result<Message, Error> {
        if let Some(first) = self.first.take() {
            return first.map_err(|error| crate::inbox::broken(&self.peer, error, awaited));
        }
        match &mut self.incoming {
            Incoming::Frames(receiver) => {
                let message = receiver.control(limit).await;
                message.map_err(|error| crate::inbox::broken(&self.peer, error, awaited))
            }
            Incoming::Messages(inbox) => inbox.next_within(awaited, limit).await,
            Incoming::Closed => Err(Error::PeerGone {
                peer: self.peer.clone(),
                awaited,
            }),
        }
    }

    fn unexpected(&self, message: &Message, awaited: &'static str) -> Error {
        crate::inbox::unexpected(&self.peer, message, awaited)
    }

    /// How long CRIU may take to remove a copy that it was told to give up.
    const KILL_LIMIT: Duration = Duration::from_secs(20);

    /// Undoes everything, newest first, and collects what could not be undone.
    /// The address goes before the gate does: nothing may answer for it here.
    async fn undo(&mut self) -> Vec<String> {
        let mut leftovers = Vec::new();
        let mut note = |what: String, result: Result<(), String>| {
            if let Err(why) = result {
                leftovers.push(format!("could not {what}: {why}"));
            }
        };
        if let Some(journal) = &mut self.journal {
            // Closed by the source's question already, or closed now.
            let _ = journal.stage(Stage::Undone);
        }
        match std::mem::replace(&mut self.engine, Engine::None) {
            Engine::None => {}
            Engine::Parked(parked) => drop(parked),
            Engine::Held(session) => {
                note(
                    "kill the copy".to_owned(),
                    give_up(session).await.map_err(|e| e.chain()),
                );
            }
        }
        if let Some(order) = &self.order {
            let pids: Vec<i32> = order
                .tree
                .processes
                .iter()
                .map(|process| process.pid)
                .collect();
            // Only what lives in the home made for this tree is the copy's.
            if let Some(home) = &self.home {
                note(
                    "kill the copy".to_owned(),
                    home.kill(&pids).map_err(|e| crate::error::chain(&e)),
                );
            }
        }
        self.tunnel = None;
        // The copy is dead, and the keeper lives in its cgroup.
        std::mem::take(&mut self.lazy).give_up();
        if let Some(home) = self.home.take() {
            note(
                "remove the cgroup of the copy".to_owned(),
                home.remove().map_err(|e| crate::error::chain(&e)),
            );
        }
        if let Some(images) = self.images.take() {
            note(
                "wipe the images".to_owned(),
                images.wipe().map_err(|e| crate::error::chain(&e)),
            );
        }
        self.place = None;
        if let Some(net) = &self.net {
            for staged in self.staged.drain(..).rev() {
                let what = format!("remove {}", staged.placement.ip);
                note(
                    what,
                    net.unstage(&staged)
                        .await
                        .map_err(|e| crate::error::chain(&e)),
                );
            }
        }
        let untracked = self.untrack();
        note("remove connection tracking entries".to_owned(), untracked);
        self.held = None;
        if let Some(gate) = self.gate.take() {
            note(
                "detach the gate".to_owned(),
                gate.detach().map_err(|e| crate::error::chain(&e)),
            );
        }
        if let Some(journal) = self.journal.take() {
            journal.discard();
        }
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
        leftovers
    }

    /// The addresses that come with the tree.
    fn addresses(&self) -> Vec<IpAddr> {
        if self.parked.is_some() {
            return Vec::new();
        }
        self.order.as_ref().map_or_else(Vec::new, |order| {
            order.tree.addresses.iter().map(|a| a.ip).collect()
        })
    }
}

/// Ends a restore so that the copy is killed before its first instruction.
async fn give_up(mut session: Session) -> Result<(), Error> {
    let limit = Destination::KILL_LIMIT;
    let _ = session.answer(false).await;
    let ended = tokio::time::timeout(limit, async {
        loop {
            match session.next(limit).await {
                Err(CriuError::Silent { .. }) => std::future::pending().await,
                Ok(Notice::Finished(_)) | Err(_) => return,
                Ok(_) => {
                    let _ = session.answer(false).await;
                }
            }
        }
    })
    .await;
    if ended.is_err() {
        session.kill().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use migrate_core::unit::AdoptChoice;

    use super::*;

    #[tokio::test]
    async fn a_source_that_does_not_stop_asking_is_sent_away() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        let hello = crate::hello("m-questions");
        let (mut source, ours) = Connection::pair(hello.clone(), hello);
        let side = Destination::new(state, ours, Arc::default(), Cancel::default());
        let served = tokio::spawn(serve_side(side, Cancel::default()));
        let question = Message::Preflight {
            tree: Box::default(),
            source: Box::new(migrate_proc::host_facts(directory.path())),
            stdio: StdioChoice::default(),
            adopt: AdoptChoice::default(),
        };
        let within = Duration::from_secs(60);
        for _ in 0..QUESTIONS_MAX {
            source.sender.control(&question).await.unwrap();
            let answer = source.receiver.control(within).await.unwrap();
            assert!(matches!(answer, Message::Findings { .. }), "{answer:?}");
        }
        source.sender.control(&question).await.unwrap();
        let answer = source.receiver.control(within).await.unwrap();
        let Message::Failed(failed) = answer else {
            panic!("{answer:?}");
        };
        assert!(failed.message.contains("more than 4 times"), "{failed:?}");
        let served = served.await.unwrap();
        assert!(
            matches!(served, Err(Error::TooManyQuestions { .. })),
            "{served:?}"
        );
    }
}
