//! The source's side of a migration.
//!
//! [`migrate`] does what the table of [`migrate_core::protocol::source`] says,
//! step by step. Up to the fence a step may be dropped at any moment: each
//! effect is noted in [`Migration`] in the same step that makes it, and
//! [`Migration::roll_back`] undoes what is noted, newest first.

mod carry;
mod deliver;
mod dump;
mod handover;
mod look;
mod pacer;
mod precopy;
mod preflight;
mod prepare;
mod segments;
mod settle;
mod soft_dirty;
mod tracking;
mod untracked;
pub(crate) mod verdict;

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use migrate_channel::{Destination, Further, Receiver, Sender, StreamOptions};
use migrate_core::Flow;
use migrate_core::convergence::{OnTimeout, Policy};
use migrate_core::facts::{HostFacts, TreeFacts};
use migrate_core::journal::{Route, Stage};
use migrate_core::phase::Phase;
use migrate_core::protocol::source::{Event, Step};
use migrate_core::protocol::{IllegalTransition, Machine as _};
use migrate_core::report::{
    Blackout, Continuity, FailureReport, Postcopy, REPORT_VERSION, Report, RoundReport,
};
use migrate_core::timeline::Span;
use migrate_core::tracked::Tracked;
use migrate_core::unit::AdoptChoice;
use migrate_core::wire::{Message, NetworkLock, RestoreChoice, StdioChoice};
use migrate_criu::{Criu, CriuError, Notice, Session, Worker};
use migrate_gate::{Counters, Gate, HeldPacket, HeldPackets, Repeats};
use migrate_memory::{ContentPrecopy, Precopy};
use migrate_net::{Net, Withdrawn};
use migrate_proc::{Fence, FenceWatch, HoldDown, Precedence, Supervisor, TcpSockets, Tree};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::segments::SegmentDump;
use crate::cancel::Cancel;
use crate::error::Error;
use crate::guard::Guard;
use crate::images::ImagePlace;
use crate::inbox::Inbox;
use crate::journal::Journal;
use crate::park::{self, Place};
use crate::progress::{Progress, Reporter};
use crate::state::{State, TreeLock};

use soft_dirty::SoftDirty;

pub use precopy::{Engine as MemoryEngine, EngineChoice};
pub use preflight::{Checked, check};

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Root of the tree.
    pub pid: i32,
    /// Where to.
    pub target: Target,
    /// The same as the user said it, for the record.
    pub route: Route,
    /// How.
    pub choices: Choices,
}

/// Where a tree goes.
#[derive(Debug, Clone)]
pub enum Target {
    /// To another host.
    Host(Destination),
    /// To a directory, to come back to this host.
    Directory(Place),
    /// To the disk of another host, to come back to this one.
    Keeper(Box<park::Keeper>),
}

impl Target {
    /// What the tree leaves on this host's disk, where it comes back to it.
    fn place(&self) -> Option<&Place> {
        match self {
            Self::Host(_) => None,
            Self::Directory(place) => Some(place),
            Self::Keeper(keeper) => Some(&keeper.stub),
        }
    }
}

/// What the user said about the tree.
#[derive(Debug, Clone)]
pub struct Choices {
    /// What becomes of standard streams that lead out of the tree.
    pub stdio: StdioChoice,
    /// Addresses that move although they look like the host's own.
    pub addresses: Vec<IpAddr>,
    /// The longest time the tree may stand still before the commit.
    pub max_blackout: Duration,
    /// Which unit of the destination is to have it.
    pub adopt: AdoptChoice,
    /// A supervisor that would start a second copy has been dealt with.
    pub ignore_supervisor: bool,
    /// How memory is moved.
    pub engine: EngineChoice,
    /// When rounds of pre-copy end.
    pub policy: Policy,
    /// Connections that carry pages, from 1 to [`STREAMS_MAX`].
    ///
    /// [`STREAMS_MAX`]: migrate_core::stream::STREAMS_MAX
    pub streams: u32,
    /// How they carry them. The limit holds while the tree runs; a frozen tree
    /// is not kept waiting.
    pub stream: StreamOptions,
    /// Compare the copy's memory with the frozen tree's before the commit.
    /// Takes as long as hashing all of it twice.
    pub verify: bool,
    /// When the copy gets its memory.
    pub restore: RestoreChoice,
    /// Hand over before the frozen tree's memory has gone over, whatever rounds
    /// came to. [`OnTimeout::Postcopy`] does where they missed their goal.
    pub postcopy: bool,
    /// What keeps packets from the frozen tree. Other locks than the gate are
    /// there to be compared with it.
    pub lock: NetworkLock,
    /// The tree comes back to this very host: its addresses stay.
    pub in_place: bool,
}

impl Choices {
    /// Whether memory may go over after the commit.
    #[must_use]
    pub fn may_postcopy(&self) -> bool {
        self.postcopy || self.policy.on_timeout == OnTimeout::Postcopy
    }

    /// When the copy gets its memory: what comes after the commit can only come
    /// while it runs.
    #[must_use]
    pub fn effective_restore(&self) -> RestoreChoice {
        if self.may_postcopy() {
            RestoreChoice::Lazy
        } else {
            self.restore
        }
    }

    /// The default of `--max-blackout`: what a peer with default timeouts of
    /// popular client libraries still bears.
    pub const MAX_BLACKOUT: Duration = Duration::from_secs(5);

    /// The default of `--streams`: one a core, for each keeps one busy with
    /// encryption, and no more than four, where most networks are full.
    #[must_use]
    pub fn default_streams() -> u32 {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        u32::try_from(cores.clamp(1, 4)).unwrap_or(1)
    }
}

/// How long the destination may take to be reached: an SSH login and the start
/// of a program, a second or two as a rule, 20 s where both hosts are busy.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

/// How long the other side may take for a step that the tree does not wait for.
const READY_LIMIT: Duration = Duration::from_secs(90);

/// How long the other side may take for a step outside the blackout.
const STEP_LIMIT: Duration = Duration::from_secs(30);

/// How a migration ended when it did not end in a commit.
#[derive(Debug)]
pub struct Failure {
    /// The phase in which it failed.
    pub phase: Phase,
    /// [`Phase::RolledBack`], [`Phase::Undecided`] or [`Phase::Lost`].
    pub outcome: Phase,
    /// Why.
    pub error: Error,
    /// What could not be undone.
    pub leftovers: Vec<String>,
    /// What there is to report; none where nothing had begun.
    pub report: Option<Box<Report>>,
}

/// Begins the names of parkings, and so of the gates that wait with them.
pub const PARKED: &str = "park-";

/// A random name for a migration.
///
/// # Errors
///
/// The kernel's random numbers cannot be read.
pub fn migration_id() -> Result<String, Error> {
    let path = "/proc/sys/kernel/random/uuid";
    let uuid = std::fs::read_to_string(path).map_err(Error::file("read", path))?;
    Ok(uuid.trim().chars().filter(|c| *c != '-').take(12).collect())
}

/// Moves a tree.
///
/// # Errors
///
/// [`Failure`] says whether the source still runs the tree.
pub async fn migrate(
    request: Request,
    reporter: Reporter,
    cancel: Cancel,
) -> Result<Report, Box<Failure>> {
    let early = |error| {
        Box::new(Failure {
            phase: Phase::Preflight,
            outcome: Phase::RolledBack,
            error,
            leftovers: Vec::new(),
            report: None,
        })
    };
    let mut migration = Migration::new(request, reporter).map_err(early)?;
    let limit = migration.request.choices.max_blackout;
    let mut frozen_until = migration.frozen_until.subscribe();
    let phase = migration.step.phase();
    migration.reporter.tell(Progress::Started { phase });
    // The first that went wrong, and where.
    let mut failed: Option<(Phase, Error)> = None;
    while !migration.step.is_end() {
        let step = migration.step;
        let lost = failed.as_ref().map(|(_, error)| error);
        let came = if step.may_be_dropped() {
            let came = tokio::select! {
                came = migration.perform(step, &cancel, lost) => came,
                () = cancel.cancelled() => Err(Error::Cancelled),
                () = passed(&mut frozen_until) => Err(Error::BlackoutLimit { limit }),
            };
            match (came, &mut migration.link) {
                (Err(lost @ Error::Channel { .. }), Some(link)) => {
                    Err(link.inbox.reason_for(lost, Migration::FAREWELL_LIMIT).await)
                }
                (Err(Error::Connect(ended)), _) if ended.is_by_signal() => {
                    let told = cancel.cancelled();
                    let told = tokio::time::timeout(Migration::SIGNAL_LIMIT, told).await;
                    Err(told.map_or(Error::Connect(ended), |()| Error::Cancelled))
                }
                (came, _) => came,
            }
        } else {
            migration.perform(step, &cancel, lost).await
        };
        let (event, detail) = came.unwrap_or_else(|error| {
            // What nobody can tell outweighs why it was asked.
            if failed.is_none() || matches!(error, Error::Undecided(_)) {
                failed = Some((step.phase(), error));
            }
            (Event::Failed, String::new())
        });
        // A defect; whoever comes after this process goes by the record.
        if let Err(illegal) = migration.follow(event, detail) {
            failed = Some((step.phase(), illegal.into()));
            break;
        }
        if migration.step.phase() > Phase::Committed
            && step.phase() <= Phase::Committed
            && let Some((phase, error)) = &failed
        {
            migration.reporter.tell(Progress::Failed {
                phase: *phase,
                error: error.chain(),
            });
        }
    }
    let outcome = match migration.step.phase() {
        Phase::Committed => return Ok(migration.report()),
        Phase::RolledBack => Phase::RolledBack,
        Phase::Lost => Phase::Lost,
        _ => {
            migration.deliver_in_doubt().await;
            migration.leave_fenced();
            Phase::Undecided
        }
    };
    let (phase, error) = failed.unwrap_or((outcome, not_yet("a reason")));
    let mut report = migration.report();
    report.outcome = outcome;
    report.failure = Some(FailureReport {
        phase,
        error: error.chain(),
    });
    Err(Box::new(Failure {
        phase,
        outcome,
        error,
        leftovers: migration.leftovers,
        report: Some(Box::new(report)),
    }))
}

/// Waits until a moment that may be set later has passed.
async fn passed(until: &mut watch::Receiver<Option<Instant>>) {
    loop {
        let moment = *until.borrow_and_update();
        let changed = match moment {
            Some(moment) => tokio::select! {
                () = tokio::time::sleep_until(moment.into()) => return,
                changed = until.changed() => changed,
            },
            None => until.changed().await,
        };
        if changed.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// The connection to the destination.
pub(crate) struct Link {
    pub(crate) peer: String,
    pub(crate) sender: Sender,
    pub(crate) inbox: Inbox,
    /// The way to further connections, until they are there.
    further: Option<Further>,
}

/// The tree as it was last seen, and what stays the same about it.
struct Plan {
    tree: Tree,
    facts: TreeFacts,
    host: HostFacts,
    interfaces: Vec<u32>,
    /// None only where preflight has refused for want of it.
    criu: Option<Criu>,
    engine: MemoryEngine,
    /// Who would start the tree again when it ends here.
    supervisor: Option<Supervisor>,
}

/// CRIU's part, which changes from a waiting worker to a running dump.
enum Engine {
    None,
    Ready(Worker),
    Dumping(Session),
}

/// Moments of one migration, all on this host's clock.
#[derive(Default)]
struct Moments {
    new_held: Option<Instant>,
    gate_closed: Option<Instant>,
    frozen: Option<Instant>,
    dumped: Option<Instant>,
    sent: Option<Instant>,
    restored: Option<Instant>,
    committed: Option<Instant>,
    owned: Option<Instant>,
    running: Option<Instant>,
}

/// Everything that a migration has done so far. A field that is set is an
/// effect that is in force; [`Migration::roll_back`] is the undo of each.
struct Migration {
    request: Request,
    reporter: Reporter,
    state: State,
    net: Option<Net>,
    id: String,
    /// Where it stands; only [`Migration::follow`] changes it.
    step: Step,
    begun: Instant,
    began_unix_ms: u64,
    phase_begun: Instant,
    /// The phases so far, and the rounds.
    phases: Vec<Span>,
    /// What phases of the blackout are made of.
    parts: Vec<Span>,
    precopy_rounds: Vec<RoundReport>,
    plan: Option<Plan>,
    moments: Moments,
    frozen_until: watch::Sender<Option<Instant>>,
    /// What the gate has counted at the end; an open gate counts no resets.
    counted: Counters,
    /// Pages sent while the tree stood still, and in rounds before.
    pages: u64,
    round_pages: u64,
    rounds: u32,
    /// Those that CRIU has listed as in store, and that follow.
    following_pages: u64,
    /// Pages that CRIU left out, because they are in store.
    in_store: u64,
    link_bytes_per_s: u64,
    sent_bytes: u64,
    running: migrate_core::wire::RunningReport,
    /// How long it took to close the gate, where that is what locks.
    gate_closed_in: Option<Duration>,
    /// The gate closed while nobody spoke.
    was_quiet: bool,
    /// What peers noticed.
    continuity: Option<Continuity>,
    /// The destination's unit that has the tree.
    unit: Option<String>,
    /// What the copy lacks goes over after the commit.
    postcopies: bool,
    /// What came of that.
    postcopy: Option<Postcopy>,
    /// The destination has put on record that it never will run the tree.
    disowned: bool,
    /// What could not be undone.
    leftovers: Vec<String>,

    // Effects, in the order in which they come about.
    _lock: TreeLock,
    link: Option<Link>,
    journal: Option<Journal>,
    guard: Option<Guard>,
    gate: Option<Arc<Gate>>,
    /// What the gate holds, while it does.
    held: Option<HeldPackets>,
    /// What of it was carried to the destination.
    carried: Vec<HeldPacket>,
    carried_bytes: usize,
    /// What of it waits to be carried.
    waiting: Vec<HeldPacket>,
    /// Connections that the tree has closed, as the destination knows them.
    ended: BTreeMap<Flow, settle::Peer>,
    /// Some of them still have something to say.
    closing: bool,
    /// What connection tracking knew of the tree's connections, as sent.
    tracked: Vec<Tracked>,
    tracked_flows: HashSet<Flow>,
    lease: Option<JoinHandle<()>>,
    /// While the tree stands still.
    precedence: Option<Precedence>,
    supervisor: Option<HoldDown>,
    fence: Option<Fence>,
    images: Option<ImagePlace>,
    /// The tracking; it has to last until CRIU has dumped the tree.
    precopy: Option<Precopy>,
    /// What rounds have sent, where memory cannot be tracked.
    content: Option<ContentPrecopy>,
    /// Rounds by CRIU; one that was given up may still hold the tree.
    soft_dirty: Option<SoftDirty>,
    /// The frozen tree's shared segments, on their way.
    segments: Option<SegmentDump>,
    engine: Engine,
    /// What a boot guards by while another host keeps the tree.
    stub: park::Stub,
    /// A connection for what goes over after the commit.
    late_lane: Option<(Sender, Receiver)>,
    /// Nothing is sent any more to the destination's agent.
    stream_ended: bool,
    /// What of the frozen tree's memory cannot follow the commit, where that is known.
    held_memory: Option<migrate_criu::Held>,
    /// What the frozen tree has written since the last round.
    changed: deliver::Changed,
    /// The sending of what goes over after the commit.
    delivery: Option<deliver::Delivery>,
    /// Closes the fence when CRIU dies with the tree in its hands.
    watch: Option<FenceWatch>,
    withdrawn: Vec<Withdrawn>,
}

impl Migration {
    fn new(request: Request, reporter: Reporter) -> Result<Self, Error> {
        migrate_proc::validate_target(request.pid)?;
        let state = State::open()?;
        let lock = state.lock_tree(request.pid)?;
        let now = Instant::now();
        let id = migration_id()?;
        Ok(Self {
            id: match request.target.place() {
                None => id,
                // Its gate stays, and this tells what it is for.
                Some(_) => format!("{PARKED}{id}"),
            },
            request,
            reporter,
            state,
            net: None,
            step: Step::Preflight,
            begun: now,
            began_unix_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| {
                    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
                }),
            phase_begun: now,
            phases: Vec::new(),
            parts: Vec::new(),
            precopy_rounds: Vec::new(),
            plan: None,
            moments: Moments::default(),
            frozen_until: watch::Sender::new(None),
            counted: Counters::default(),
            pages: 0,
            round_pages: 0,
            rounds: 0,
            following_pages: 0,
            in_store: 0,
            link_bytes_per_s: 0,
            sent_bytes: 0,
            running: migrate_core::wire::RunningReport::default(),
            gate_closed_in: None,
            was_quiet: false,
            continuity: None,
            unit: None,
            postcopies: false,
            postcopy: None,
            disowned: false,
            leftovers: Vec::new(),
            _lock: lock,
            link: None,
            journal: None,
            guard: None,
            gate: None,
            held: None,
            carried: Vec::new(),
            carried_bytes: 0,
            waiting: Vec::new(),
            ended: BTreeMap::new(),
            closing: false,
            tracked: Vec::new(),
            tracked_flows: HashSet::new(),
            lease: None,
            precedence: None,
            supervisor: None,
            fence: None,
            images: None,
            precopy: None,
            content: None,
            soft_dirty: None,
            segments: None,
            engine: Engine::None,
            stub: park::Stub::default(),
            late_lane: None,
            stream_ended: false,
            held_memory: None,
            changed: deliver::Changed::default(),
            delivery: None,
            watch: None,
            withdrawn: Vec::new(),
        })
    }

    /// Does what a step stands for, and says what came of it; an error is
    /// [`Event::Failed`]. `lost` is what has gone wrong before.
    async fn perform(
        &mut self,
        step: Step,
        cancel: &Cancel,
        lost: Option<&Error>,
    ) -> Result<(Event, String), Error> {
        let detail = match step {
            Step::Preflight => self.preflight().await?,
            Step::Track => self.track().await?,
            Step::Prepare => self.prepare().await?,
            Step::Precopy => self.precopy().await?,
            Step::Freeze => self.freeze().await?,
            Step::Dump => self.dump().await?,
            Step::Restore => self.restore().await?,
            Step::Fence => self.close_fence().map(|()| String::new())?,
            Step::Prove => self.prove().await.map(|()| String::new())?,
            Step::Record => self.record_handover(cancel).map(|()| String::new())?,
            Step::Withdraw => self.withdraw().await.map(|()| String::new())?,
            Step::Go => self.go().await.map(|()| String::new())?,
            Step::AskOwner | Step::AskRunner => {
                return self
                    .ask(step, lost)
                    .await
                    .map(|event| (event, String::new()));
            }
            Step::Await => self.await_running().await?,
            Step::Remove | Step::RemoveLost => self.remove().await,
            Step::Deliver => self.deliver().await?,
            Step::TakeBack => {
                self.leftovers = self.roll_back().await;
                String::new()
            }
            Step::Committed | Step::RolledBack | Step::Undecided | Step::Lost => String::new(),
        };
        Ok((Event::Done, detail))
    }

    /// Moves on to the next step, and says so when that is another phase.
    fn follow(&mut self, event: Event, detail: String) -> Result<(), IllegalTransition> {
        let ended = self.step.phase();
        self.step = self.step.on(event)?;
        let phase = self.step.phase();
        if phase == ended {
            return Ok(());
        }
        let start = self.phase_begun;
        let took_us = micros(start.elapsed());
        self.phase_begun = Instant::now();
        self.phases.push(Span {
            name: ended.name().to_owned(),
            start_us: self.since_begun(start).cast_signed(),
            took_us,
        });
        if phase > Phase::Committed {
            return Ok(());
        }
        if let Some(gate) = &self.gate {
            gate.set_progress(phase.number(), self.rounds);
        }
        self.reporter.tell(Progress::Ended {
            phase: ended,
            took_us,
            detail,
        });
        if phase <= Phase::Finish {
            self.reporter.tell(Progress::Started { phase });
            crate::pause::at(phase.name());
        }
        Ok(())
    }

    fn link(&mut self) -> Result<&mut Link, Error> {
        self.link.as_mut().ok_or_else(|| not_yet("the connection"))
    }

    fn plan(&self) -> Result<&Plan, Error> {
        self.plan.as_ref().ok_or_else(|| not_yet("the plan"))
    }

    fn criu(&self) -> Result<&Criu, Error> {
        self.plan()?.criu.as_ref().ok_or_else(|| not_yet("CRIU"))
    }

    /// The gate; none where the tree has no address that peers reach.
    fn gate(&self) -> Option<&Arc<Gate>> {
        self.gate.as_ref()
    }

    fn unexpected(&self, message: &Message, awaited: &'static str) -> Error {
        let peer = self
            .link
            .as_ref()
            .map_or("the destination", |link| &link.peer);
        crate::inbox::unexpected(peer, message, awaited)
    }

    /// Sends one message.
    async fn send(&mut self, message: &Message) -> Result<(), Error> {
        let link = self.link()?;
        link.sender
            .control(message)
            .await
            .map_err(|source| Error::Channel {
                peer: link.peer.clone(),
                source,
            })
    }

    /// How long the destination may take to undo its side before the source
    /// stops waiting for it. The source's tree runs again before that.
    const PEER_UNDO_LIMIT: Duration = Duration::from_secs(10);

    /// How long the word that it is over may take to be handed to the kernel, or
    /// the other side's to be read, which is all that is waited for while the tree
    /// still stands.
    const FAREWELL_LIMIT: Duration = Duration::from_millis(100);

    /// How long a signal that has ended ssh may take to be noticed here, too, if it was for
    /// both: it was sent to both at once.
    const SIGNAL_LIMIT: Duration = Duration::from_millis(200);

    /// How long CRIU may take to put the tree back on its feet.
    const THAW_LIMIT: Duration = Duration::from_secs(20);

    /// Undoes everything, newest first, and collects what could not be undone.
    async fn roll_back(&mut self) -> Vec<String> {
        let mut leftovers = Vec::new();
        self.changed = deliver::Changed::default();
        self.delivery = None;
        self.late_lane = None;
        let mut note = |what: &str, result: Result<(), String>| {
            if let Err(why) = result {
                leftovers.push(format!("could not {what}: {why}"));
            }
        };
        // Whoever comes after a crash in the middle need not ask once more.
        if let Some(journal) = &mut self.journal
            && journal.record().stage == Stage::HandedOver
            && let Err(error) = journal.stage(Stage::Undone)
        {
            tracing::warn!(error = %error.chain(), "could not note that the tree is taken back");
        }
        // The destination undoes its side when the connection ends. It can not
        // run the copy: `Go` was not sent, or it has disowned the tree.
        // A peer that takes nothing must not keep the tree frozen meanwhile.
        let told = match &mut self.link {
            Some(link) => tokio::time::timeout(Self::FAREWELL_LIMIT, link.sender.close())
                .await
                .is_ok_and(|closed| closed.is_ok()),
            None => false,
        };
        if let Some(net) = &self.net {
            for withdrawn in self.withdrawn.drain(..).rev() {
                let what = format!("put {} back", withdrawn.ip);
                note(
                    &what,
                    net.restore(&withdrawn)
                        .await
                        .map_err(|e| crate::error::chain(&e)),
                );
                // The destination may have announced it before it gave up.
                if self.disowned
                    && let Ok(Some(placement)) = net.placed(withdrawn.ip).await
                    && let Err(error) = net.announce(&[placement]).await
                {
                    tracing::warn!(error = %crate::error::chain(&error), "could not announce the address");
                }
            }
        }
        // From here on CRIU's end is nothing to be afraid of, unless it has
        // come already.
        let fell_shut = self.watch.take().is_some_and(FenceWatch::end);
        let mut engine = std::mem::replace(&mut self.engine, Engine::None);
        let mut died = match &mut engine {
            Engine::Dumping(session) => fell_shut || !session.alive(),
            Engine::None | Engine::Ready(_) => false,
        };
        if let Some(fence) = &self.fence
            && !died
        {
            note(
                "open the fence",
                fence.open().map_err(|e| crate::error::chain(&e)),
            );
        }
        match engine {
            Engine::None => {}
            Engine::Ready(worker) => drop(worker),
            Engine::Dumping(session) if !died => match thaw(session).await {
                Ok(()) => {}
                Err(Error::Criu(CriuError::Died { .. })) => died = true,
                Err(error) => note("thaw the tree", Err(error.chain())),
            },
            Engine::Dumping(_) => {}
        }
        if let Some(fence) = &self.fence
            && died
        {
            match heal(fence) {
                Ok(0) => {}
                Ok(healed) => self.reporter.warn(format!(
                    "CRIU has died with the tree in its hands; {healed} of its connections were taken out of repair mode"
                )),
                Err(error) => note(
                    "put the tree's connections in order after CRIU has died",
                    Err(crate::error::chain(&error)),
                ),
            }
        }
        if let Some(session) = self.soft_dirty.take().and_then(|mut s| s.take_running()) {
            match thaw(session).await {
                // Its sockets were not touched.
                Ok(()) | Err(Error::Criu(CriuError::Died { .. })) => {}
                Err(error) => note("end a round", Err(error.chain())),
            }
        }
        note("remove CRIU's network lock", self.clear_lock());
        self.precopy = None;
        self.segments = None;
        if let Some(lease) = self.lease.take() {
            lease.abort();
            // The renewer holds the gate until it has ended.
            let _ = lease.await;
        }
        if let Some(gate) = self.gate.take() {
            // The sockets live again; nothing newer may overtake what waits.
            gate.hold_answers();
            let mut waiting = std::mem::take(&mut self.carried);
            waiting.append(&mut self.waiting);
            note(
                "open the gate",
                crate::held::release(&gate, &mut self.held, waiting, Repeats::default())
                    .map_err(|e| crate::error::chain(&e)),
            );
            self.held = None;
            note("detach the gate", detach(gate));
        }
        if let Some(fence) = self.fence.take() {
            note(
                "remove the fence",
                fence.release().map_err(|e| crate::error::chain(&e)),
            );
        }
        if let Some(hold) = self.supervisor.take() {
            note(
                "give the unit back to systemd",
                hold.release().map_err(|e| crate::error::chain(&e)),
            );
        }
        self.images = None;
        note(
            "remove the stub",
            self.stub.remove().map_err(|error| error.chain()),
        );
        if let Some(journal) = self.journal.take() {
            journal.discard();
        }
        self.dismiss_guard();
        if let Some(mut link) = self.link.take() {
            if told {
                link.inbox.closed(Self::PEER_UNDO_LIMIT).await;
            }
            if let Target::Keeper(keeper) = &self.request.target {
                let name = keeper.stub.name();
                let stub = std::mem::take(&mut self.stub);
                if let Err(error) = stub.disown(keeper, link.peer.clone(), &self.id).await {
                    self.reporter.warn(format!(
                        "{} may have something of {name} on its disk, which it does not need: {}",
                        link.peer,
                        error.chain()
                    ));
                }
            }
        }
        leftovers
    }

    /// Removes what CRIU's own lock has left.
    fn clear_lock(&self) -> Result<(), String> {
        let addresses: Vec<IpAddr> = self.plan.as_ref().map_or_else(Vec::new, |plan| {
            plan.facts.addresses.iter().map(|a| a.ip).collect()
        });
        let cleared = crate::criu_lock(self.request.choices.lock).clear(&addresses);
        cleared
            .map(drop)
            .map_err(|error| crate::error::chain(&error))
    }

    fn dismiss_guard(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }

    fn silent(&self, awaited: &'static str, waited: Duration) -> Error {
        Error::PeerSilent {
            peer: self
                .link
                .as_ref()
                .map_or_else(String::new, |link| link.peer.clone()),
            awaited,
            waited,
        }
    }

    /// Leaves a tree alone that may run elsewhere: fenced, its gate closed for
    /// good, its address withdrawn, its record on disk.
    fn leave_fenced(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.abort();
        }
        // From here on it is for the user to ask again.
        self.dismiss_guard();
        if let Some(watch) = self.watch.take() {
            watch.end();
        }
        if let Some(fence) = self.fence.take() {
            std::mem::forget(fence);
        }
        if let Some(hold) = self.supervisor.take() {
            std::mem::forget(hold);
        }
    }

    /// A part of the phase that lasts is over, and the next begins now.
    fn part(&mut self, name: &str, began: Instant) -> Instant {
        let now = Instant::now();
        self.parts.push(Span {
            name: name.to_owned(),
            start_us: self.since_begun(began).cast_signed(),
            took_us: micros(now.saturating_duration_since(began)),
        });
        now
    }

    fn since_begun(&self, moment: Instant) -> u64 {
        micros(moment.saturating_duration_since(self.begun))
    }

    /// The closing block.
    fn report(&self) -> Report {
        let m = &self.moments;
        let at = |moment: Option<Instant>| moment.map(|moment| self.since_begun(moment));
        let (destination_steps, destination_parts, clock_error_us) =
            match (at(m.committed), at(m.owned)) {
                (Some(go_us), Some(owned_us)) if !self.running.timing.spans.is_empty() => {
                    let (spans, parts, error_us) = self.running.timing.placed(go_us, owned_us);
                    (spans, parts, Some(error_us))
                }
                _ => (Vec::new(), Vec::new(), None),
            };
        let span = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => micros(to.saturating_duration_since(from)),
            _ => 0,
        };
        let facts = self.plan.as_ref().map(|plan| &plan.facts);
        Report {
            version: REPORT_VERSION,
            began_unix_ms: self.began_unix_ms,
            migration_id: self.id.clone(),
            outcome: self.step.phase(),
            pid: self.request.pid,
            name: facts
                .and_then(|facts| facts.processes.first())
                .map_or_else(String::new, |process| process.name.clone()),
            source: crate::hostname(),
            destination: self
                .link
                .as_ref()
                .map_or_else(|| self.request.route.to.clone(), |link| link.peer.clone()),
            pages: self.round_pages + self.pages,
            frozen_pages: self.pages,
            rounds: self.rounds,
            lazy_pages: self.running.lazy_pages,
            postcopy: self.postcopy,
            bytes: self.sent_bytes,
            frozen_us: span(m.frozen, m.running),
            blackout: Blackout {
                freeze_us: span(m.gate_closed, m.frozen),
                dump_us: span(m.frozen, m.dumped),
                transfer_us: span(m.dumped, m.sent),
                restore_us: span(m.sent, m.restored),
                takeover_us: span(m.restored, m.running),
            },
            connections: facts.map_or(0, |facts| facts.flows.len() as u64),
            held_packets: self.counted.held_ingress_packets + self.running.held_packets,
            dropped_packets: crate::dropped_packets(&self.counted) + self.running.dropped_packets,
            rst_sent: self.counted.rst_sent + self.running.rst_sent,
            gate_close_ns: self.gate_closed_in.map(nanos),
            new_held_us: m.new_held.map(|_| span(m.new_held, m.gate_closed)),
            total_us: micros(self.begun.elapsed()),
            continuity: self.continuity.clone(),
            precopy: self.precopy_rounds.clone(),
            phases: self.phases.clone(),
            destination_steps,
            source_parts: self.parts.clone(),
            destination_parts,
            clock_error_us,
            blackout_start_us: at(m.gate_closed),
            unit: self.unit.clone(),
            failure: None,
        }
    }
}

/// Puts a tree's connections in order that a dead CRIU has left in repair
/// mode, before the tree can use them; how many.
fn heal(fence: &Fence) -> Result<usize, migrate_proc::ProcError> {
    // Closed already where the watch was in time. A tree that does not come to
    // rest is healed all the same.
    if let Err(error) = fence.close() {
        tracing::warn!(error = %crate::error::chain(&error), "could not close the fence");
    }
    let healed = fence
        .living()
        .and_then(|pids| TcpSockets::of(&pids))
        .and_then(|sockets| sockets.heal());
    fence.open()?;
    healed
}

/// Ends a dump so that the tree runs on: a held notification is refused, and
/// CRIU's last word awaited.
async fn thaw(mut session: Session) -> Result<(), Error> {
    let limit = Migration::THAW_LIMIT;
    // Refuses the notification that CRIU may be held in.
    let _ = session.answer(false).await;
    let ended = tokio::time::timeout(limit, async {
        loop {
            match session.next(limit).await {
                Ok(Notice::Finished(_)) => return Ok(()),
                // The tree runs, and nobody has put its sockets in order.
                Err(error @ CriuError::Died { .. }) => return Err(error.into()),
                Err(CriuError::Silent { .. }) => std::future::pending().await,
                // It failed, and has undone what it did.
                Err(_) => return Ok(()),
                Ok(_) => {
                    let _ = session.answer(false).await;
                }
            }
        }
    })
    .await;
    ended.unwrap_or_else(|_| {
        Err(Error::Changed(format!(
            "CRIU has not let go of the tree within {} s",
            limit.as_secs()
        )))
    })
}

/// Detaches a gate that nobody else holds.
fn detach(gate: Arc<Gate>) -> Result<(), String> {
    match Arc::into_inner(gate) {
        Some(gate) => gate.detach().map_err(|e| crate::error::chain(&e)),
        None => Err("it is still in use".to_owned()),
    }
}

pub(crate) fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

/// A step needed something that an earlier step has not made: a defect.
fn not_yet(what: &'static str) -> Error {
    Error::Changed(format!("{what} is not there yet"))
}
