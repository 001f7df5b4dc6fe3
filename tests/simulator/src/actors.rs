//! The processes: the driver on the source, agents on the destination, and
//! whoever recovers what they have left.

use migrate_core::journal::Stage;
use migrate_core::protocol::recovery::{self, Evidence};
use migrate_core::protocol::{destination, follow, source};

use crate::Breach;
use crate::ops::{self, DestinationOp, SourceOp};
use crate::world::{Copy, Gate, Late, Link, Message, World};

/// Times a question is asked (`VERDICT_TRIES`, `TRIES`).
const TRIES: u32 = 5;

/// One in so many looks at a quiet connection, a wait runs out.
const PATIENCE: usize = 400;

/// What came of one effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Came<E> {
    /// On to the next one.
    Next,
    /// Nothing yet.
    Waits,
    /// The step is over.
    Over(E),
}

/// `migrate` on the source.
#[derive(Debug, Clone)]
pub(crate) struct Driver {
    pub(crate) alive: bool,
    pub(crate) cancelled: bool,
    step: source::Step,
    at: usize,
    link: Option<usize>,
    question: Option<usize>,
    tries: u32,
    /// What it last wrote.
    wrote: Option<Stage>,
}

impl Driver {
    pub(crate) fn new() -> Self {
        Self {
            alive: true,
            cancelled: false,
            step: source::Step::Preflight,
            at: 0,
            link: None,
            question: None,
            tries: 0,
            wrote: None,
        }
    }

    pub(crate) fn is_at_work(&self) -> bool {
        self.alive && !is_end(self.step)
    }

    pub(crate) fn links(&self) -> Vec<usize> {
        self.link.into_iter().chain(self.question).collect()
    }

    /// Whether its last word was true.
    pub(crate) fn was_right(&self, world: &World<'_>) -> Result<(), Breach> {
        let ran = world.destination.ran || world.destination.let_go_in_vain;
        let right = match self.step {
            source::Step::Committed => ran && !world.destination.starved,
            source::Step::Lost => ran && !world.source.alive,
            source::Step::RolledBack => world.source.alive && !world.destination.ran,
            _ => true,
        };
        if right {
            Ok(())
        } else {
            Err(Breach::WrongWord)
        }
    }
}

fn is_end(step: source::Step) -> bool {
    use source::Step;
    matches!(
        step,
        Step::Committed | Step::RolledBack | Step::Undecided | Step::Lost
    )
}

/// The agent's part of one connection.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub(crate) alive: bool,
    pub(crate) link: usize,
    /// It only answers a question, and moves nothing.
    pub(crate) asked: bool,
    step: destination::Step,
    at: usize,
    pages: u32,
    wrote: Option<Stage>,
}

impl Server {
    fn new(link: usize, asked: bool) -> Self {
        Self {
            alive: true,
            link,
            asked,
            step: destination::Step::Listen,
            at: 0,
            pages: 0,
            wrote: None,
        }
    }

    pub(crate) fn is_at_work(&self) -> bool {
        use destination::Step;
        let ended = matches!(
            self.step,
            Step::Answered | Step::Running | Step::Undone | Step::Abandoned
        );
        self.alive && !ended
    }
}

/// The ops of somebody who recovers.
#[derive(Debug, Clone, Copy)]
enum Work {
    Source(&'static [SourceOp]),
    Destination(&'static [DestinationOp]),
    Over,
}

/// A guard, or `migrate recover`, on one host.
#[derive(Debug, Clone)]
pub(crate) struct Recoverer {
    work: Work,
    at: usize,
    holds_claim: bool,
    question: Option<usize>,
    tries: u32,
}

impl Recoverer {
    fn new(work: Work) -> Self {
        Self {
            work,
            at: 0,
            holds_claim: false,
            question: None,
            tries: 0,
        }
    }

    pub(crate) fn source() -> Self {
        Self::new(Work::Source(ops::DECIDE_SOURCE))
    }

    pub(crate) fn destination() -> Self {
        Self::new(Work::Destination(ops::DECIDE_DESTINATION))
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(self.work, Work::Over)
    }

    pub(crate) fn end(&mut self) {
        self.work = Work::Over;
    }

    fn goes_on_with(&mut self, work: Work) {
        self.work = work;
        self.at = 0;
    }
}

/// What somebody on the source reads from a connection.
enum Read {
    Message(Message),
    Nothing,
    Gone,
}

impl World<'_> {
    fn read(&mut self, link: usize, at_source: bool) -> Read {
        let Link {
            to_destination,
            to_source,
            closed_by_source,
            closed_by_destination,
            cut,
        } = &mut self.links[link];
        let (queue, closed) = if at_source {
            (to_source, *closed_by_destination)
        } else {
            (to_destination, *closed_by_source)
        };
        // Any delay: what is there is not always there yet.
        if !*cut
            && self.random.one_in(2)
            && let Some(message) = queue.pop_front()
        {
            return Read::Message(message);
        }
        let hopeless = *cut || (closed && queue.is_empty());
        if self.random.one_in(if hopeless { 4 } else { PATIENCE }) {
            Read::Gone
        } else {
            Read::Nothing
        }
    }

    fn await_message<E>(&mut self, link: Option<usize>, awaited: Message, failed: E) -> Came<E> {
        let Some(link) = link else {
            return Came::Over(failed);
        };
        match self.read(link, true) {
            Read::Message(message) if message == awaited => Came::Next,
            Read::Nothing => Came::Waits,
            Read::Message(_) | Read::Gone => Came::Over(failed),
        }
    }

    /// A send into a connection that is cut seems to succeed, or does not.
    fn send(&mut self, link: Option<usize>, from_source: bool, message: Message) -> bool {
        let Some(link) = link else {
            return false;
        };
        let unlucky = self.random.one_in(2);
        let link = &mut self.links[link];
        let closed = link.closed_by_destination || link.closed_by_source;
        if link.cut || closed {
            return !unlucky && !closed;
        }
        if from_source {
            link.to_destination.push_back(message);
        } else {
            link.to_source.push_back(message);
        }
        true
    }

    fn connect(&mut self, asked: bool) -> usize {
        self.links.push(Link {
            cut: self.down > 0,
            ..Link::default()
        });
        let link = self.links.len() - 1;
        self.servers.push(Server::new(link, asked));
        link
    }

    // ---- the source

    /// One effect of the driver.
    pub(crate) fn drive(&mut self) -> Result<(), Breach> {
        if !self.driver.is_at_work() {
            return Ok(());
        }
        let step = self.driver.step;
        let ops = ops::of_source(step);
        let came = if step.may_be_dropped() && std::mem::take(&mut self.driver.cancelled) {
            Came::Over(source::Event::Failed)
        } else {
            match ops.get(self.driver.at) {
                None => Came::Over(source::Event::Done),
                Some(op) => self.do_at_source(*op),
            }
        };
        if came != Came::Waits {
            let op = ops.get(self.driver.at);
            self.note(|| format!("driver {step:?} {op:?}: {came:?}"));
        }
        self.time_passes();
        match came {
            Came::Waits => {}
            Came::Next => self.driver.at += 1,
            Came::Over(event) => {
                self.driver.at = 0;
                self.driver.step =
                    follow(&self.rules.source, step, event).map_err(|_| Breach::Illegal)?;
                if self.driver.step == source::Step::Undecided
                    && self.late == Late::Missing
                    && self.random.one_in(2)
                {
                    // It sends what it has all the same before it ends.
                    self.late = Late::None;
                }
            }
        }
        Ok(())
    }

    fn may_write(&self, wrote: Option<Stage>) -> bool {
        wrote.is_some_and(|own| (self.rules.may_write)(self.source.record, own))
    }

    fn do_at_source(&mut self, op: SourceOp) -> Came<source::Event> {
        use source::Event;
        let failed = Came::Over(Event::Failed);
        let done = |fine: bool| if fine { Came::Next } else { failed };
        match op {
            SourceOp::Connect => self.driver.link = Some(self.connect(false)),
            SourceOp::AwaitFindings => {
                return self.await_message(self.driver.link, Message::Findings, Event::Failed);
            }
            SourceOp::BeginRecord => {
                self.source.record = Some(Stage::Preparing);
                self.driver.wrote = Some(Stage::Preparing);
            }
            SourceOp::AttachGate => self.source.gate = Gate::Open,
            SourceOp::SendPrepare => {
                return done(self.send(self.driver.link, true, Message::Prepare));
            }
            SourceOp::AwaitPrepared => {
                return self.await_message(self.driver.link, Message::Prepared, Event::Failed);
            }
            SourceOp::CloseGate => self.source.gate = Gate::Closed { leased: true },
            SourceOp::Seize => {
                self.source.criu = true;
                self.source.seized = true;
                self.source.dumped = true;
            }
            SourceOp::SendDumped => {
                if self.random.one_in(4) {
                    self.late = Late::Missing;
                }
                return done(
                    self.send(self.driver.link, true, Message::Pages)
                        && self.send(self.driver.link, true, Message::Dumped),
                );
            }
            SourceOp::AwaitRestored => {
                return self.await_message(self.driver.link, Message::Restored, Event::Failed);
            }
            SourceOp::CloseFence => self.source.fenced = true,
            SourceOp::CriuLives => return done(self.source.criu),
            SourceOp::GateForGood => self.source.gate = Gate::Closed { leased: false },
            SourceOp::WriteHandedOver => {
                if std::mem::take(&mut self.driver.cancelled) {
                    return failed;
                }
                return done(self.driver_writes(Stage::HandedOver));
            }
            SourceOp::Withdraw => {
                self.source.address = false;
                return done(!self.random.one_in(50));
            }
            SourceOp::SendGo => return done(self.send(self.driver.link, true, Message::Go)),
            SourceOp::AwaitOwned => {
                return self.await_message(self.driver.link, Message::Owned, Event::Failed);
            }
            SourceOp::AwaitRunning => {
                return self.await_message(self.driver.link, Message::Running, Event::Failed);
            }
            SourceOp::Deliver => match self.late {
                Late::None => {}
                Late::Lost => return failed,
                Late::Missing if self.random.one_in(4) => self.late = Late::None,
                Late::Missing => return Came::Waits,
            },
            SourceOp::CloseLink => {
                if let Some(link) = self.driver.link.take() {
                    self.links[link].closed_by_source = true;
                }
                self.driver.tries = 0;
            }
            SourceOp::Ask => {
                let link = self.connect(true);
                self.driver.question = Some(link);
                self.driver.tries += 1;
                self.send(Some(link), true, Message::Verdict);
            }
            SourceOp::AwaitVerdict => return self.await_verdict(),
            SourceOp::WriteUndone => {
                self.lose_late();
                if self.driver.wrote == Some(Stage::HandedOver) {
                    self.driver_writes(Stage::Undone);
                }
            }
            SourceOp::Thaw => {
                self.source.criu = false;
                self.source.seized = false;
            }
            SourceOp::KillTree
            | SourceOp::PutAddressBack
            | SourceOp::OpenFence
            | SourceOp::DetachGate
            | SourceOp::Discard => self.touch_source(op),
            SourceOp::WriteDone => {
                if !matches!(self.late, Late::None) {
                    self.driver_writes(Stage::Done);
                }
            }
            SourceOp::AwaitCriu | SourceOp::Decide | SourceOp::Told => {}
        }
        Came::Next
    }

    fn driver_writes(&mut self, stage: Stage) -> bool {
        let may = self.may_write(self.driver.wrote);
        if may {
            self.source.record = Some(stage);
            self.driver.wrote = Some(stage);
        }
        may
    }

    fn await_verdict(&mut self) -> Came<source::Event> {
        use source::Event;
        let Some(link) = self.driver.question else {
            return Came::Over(Event::Failed);
        };
        let again = match self.read(link, true) {
            Read::Nothing => return Came::Waits,
            Read::Message(Message::VerdictIs(stage)) => match Event::says(stage) {
                Some(event) if follow(&self.rules.source, self.driver.step, event).is_ok() => {
                    self.driver.link = self.driver.question.take();
                    return Came::Over(event);
                }
                _ => true,
            },
            Read::Message(_) | Read::Gone => true,
        };
        self.links[link].closed_by_source = true;
        if again && self.driver.tries < TRIES {
            let link = self.connect(true);
            self.driver.question = Some(link);
            self.driver.tries += 1;
            self.send(Some(link), true, Message::Verdict);
            return Came::Waits;
        }
        Came::Over(Event::Failed)
    }

    /// Effects that a driver and a recovering process have in common.
    fn touch_source(&mut self, op: SourceOp) {
        match op {
            SourceOp::KillTree => {
                // The copy's missing pages are the tree's.
                self.lose_late();
                self.source.alive = false;
                self.source.criu = false;
            }
            SourceOp::Withdraw => self.source.address = false,
            SourceOp::CloseFence => self.source.fenced = true,
            SourceOp::PutAddressBack => self.source.address = true,
            SourceOp::OpenFence => self.source.fenced = false,
            SourceOp::DetachGate => self.source.gate = Gate::None,
            SourceOp::Discard => self.source.record = None,
            _ => {}
        }
    }

    // ---- the destination

    /// One effect of an agent's connection.
    pub(crate) fn serve(&mut self, index: usize) -> Result<(), Breach> {
        if !self.servers[index].is_at_work() {
            return Ok(());
        }
        if self.servers[index].asked {
            self.answer(index);
            return Ok(());
        }
        let step = self.servers[index].step;
        let ops = ops::of_destination(step);
        let at = self.servers[index].at;
        let came = match ops.get(at) {
            None => Came::Over(destination::Event::Done),
            Some(op) => self.do_at_destination(index, *op),
        };
        if came != Came::Waits {
            self.note(|| format!("agent {step:?} {:?}: {came:?}", ops.get(at)));
        }
        match came {
            Came::Waits => {}
            Came::Next => self.servers[index].at += 1,
            Came::Over(event) => {
                let next =
                    follow(&self.rules.destination, step, event).map_err(|_| Breach::Illegal)?;
                let server = &mut self.servers[index];
                server.at = 0;
                server.step = next;
                if !server.is_at_work() {
                    self.links[server.link].closed_by_destination = true;
                }
            }
        }
        Ok(())
    }

    /// The answer to a question, which settles a dead owner's record first.
    fn answer(&mut self, index: usize) {
        let link = self.servers[index].link;
        if self.servers[index].at == 0 {
            match self.read(link, false) {
                Read::Message(Message::Verdict) => {
                    self.servers[index].at = 1;
                    if self.destination.ownerless && self.destination.record.is_some() {
                        self.recoverers.push(Recoverer::destination());
                    }
                }
                Read::Nothing => {}
                Read::Message(_) | Read::Gone => self.servers[index].alive = false,
            }
            return;
        }
        // Waits until it is settled, or for too long.
        let settling = self
            .recoverers
            .iter()
            .any(|one| matches!(one.work, Work::Destination(_)));
        if settling && !self.random.one_in(PATIENCE) {
            return;
        }
        let (answer, becomes) = (self.rules.verdict)(self.destination.record);
        if becomes.is_some() {
            self.destination.record = becomes;
        }
        self.note(|| format!("answers {answer:?}"));
        self.send(Some(link), false, Message::VerdictIs(answer));
        self.servers[index].alive = false;
        self.links[link].closed_by_destination = true;
    }

    fn read_at_destination(&mut self, index: usize, awaited: Message) -> Came<destination::Event> {
        use destination::Event;
        match self.read(self.servers[index].link, false) {
            Read::Message(message) if message == awaited => Came::Next,
            Read::Nothing => Came::Waits,
            Read::Message(Message::Pages) => {
                self.servers[index].pages += 1;
                Came::Waits
            }
            Read::Message(_) | Read::Gone => Came::Over(Event::Failed),
        }
    }

    fn do_at_destination(&mut self, index: usize, op: DestinationOp) -> Came<destination::Event> {
        use destination::Event;
        let failed = Came::Over(Event::Failed);
        let done = |fine: bool| if fine { Came::Next } else { failed };
        let link = Some(self.servers[index].link);
        match op {
            DestinationOp::Findings => {
                return done(self.send(link, false, Message::Findings));
            }
            DestinationOp::AwaitPrepare => {
                return self.read_at_destination(index, Message::Prepare);
            }
            DestinationOp::BeginRecord => {
                self.destination.record = Some(Stage::Preparing);
                self.servers[index].wrote = Some(Stage::Preparing);
            }
            DestinationOp::CloseGate => {
                self.destination.gate = Gate::Closed { leased: false };
            }
            DestinationOp::Stage => self.destination.staged = true,
            DestinationOp::SendPrepared => {
                return done(self.send(link, false, Message::Prepared));
            }
            DestinationOp::AwaitDumped => {
                return match self.read_at_destination(index, Message::Dumped) {
                    Came::Next => done(self.servers[index].pages == 1),
                    other => other,
                };
            }
            DestinationOp::Build => {
                self.destination.criu = true;
                self.destination.copy = Copy::Held;
            }
            DestinationOp::SendRestored => {
                return done(self.send(link, false, Message::Restored));
            }
            DestinationOp::AwaitGo => return self.read_at_destination(index, Message::Go),
            DestinationOp::CriuLives => return done(self.destination.criu),
            DestinationOp::WriteOwned => return done(self.agent_writes(index, Stage::Owned)),
            // The source may be gone; the tree runs all the same.
            DestinationOp::SendOwned => {
                self.send(link, false, Message::Owned);
            }
            DestinationOp::SendRunning => {
                self.send(link, false, Message::Running);
            }
            DestinationOp::NoteLetGo => self.destination.noted = true,
            DestinationOp::LetGo => {
                let held = self.destination.criu && self.destination.copy == Copy::Held;
                if held {
                    self.destination.copy = Copy::Live;
                } else {
                    // The word could not be said, so it was not heard.
                    self.destination.noted = false;
                }
                return done(held);
            }
            DestinationOp::Run => {
                let fine = self.destination.criu && self.destination.copy == Copy::Live;
                if fine {
                    self.destination.copy = Copy::Running;
                    self.destination.ran = true;
                    self.destination.criu = false;
                }
                return done(fine);
            }
            DestinationOp::WriteDone => {
                self.agent_writes(index, Stage::Done);
            }
            DestinationOp::WriteUndone => {
                self.agent_writes(index, Stage::Undone);
            }
            DestinationOp::GiveUp => {
                self.destination.ownerless = true;
                // The connection to CRIU ends with this.
                if self.destination.criu {
                    self.destination.criu = false;
                    if matches!(self.destination.copy, Copy::Held | Copy::Live) {
                        self.destination.let_go_in_vain |= self.destination.copy == Copy::Live;
                        self.destination.copy = Copy::None;
                    }
                }
                self.recoverers.push(Recoverer::destination());
            }
            DestinationOp::Announce
            | DestinationOp::OpenGate
            | DestinationOp::DetachGate
            | DestinationOp::KillCopy
            | DestinationOp::Unstage
            | DestinationOp::Discard => self.touch_destination(op),
            DestinationOp::Decide
            | DestinationOp::Unnote
            | DestinationOp::AwaitCriu
            | DestinationOp::Examine => {}
        }
        Came::Next
    }

    fn agent_writes(&mut self, index: usize, stage: Stage) -> bool {
        let wrote = self.servers[index].wrote;
        let may = wrote.is_some_and(|own| (self.rules.may_write)(self.destination.record, own));
        if may {
            self.destination.record = Some(stage);
            self.servers[index].wrote = Some(stage);
        }
        may
    }

    fn touch_destination(&mut self, op: DestinationOp) {
        let host = &mut self.destination;
        match op {
            DestinationOp::Announce => {
                host.staged = true;
                host.announced = true;
            }
            DestinationOp::OpenGate => host.gate = Gate::Open,
            DestinationOp::DetachGate => host.gate = Gate::None,
            DestinationOp::KillCopy => {
                host.copy = Copy::None;
                host.criu = false;
            }
            DestinationOp::Unstage => {
                host.staged = false;
                host.announced = false;
            }
            DestinationOp::Discard => {
                host.record = None;
                host.noted = false;
            }
            _ => {}
        }
    }

    // ---- recovery

    pub(crate) fn drop_claim(&mut self, index: usize) {
        if std::mem::take(&mut self.recoverers[index].holds_claim) {
            match self.recoverers[index].work {
                Work::Source(_) => self.source.claimed = false,
                Work::Destination(_) => self.destination.claimed = false,
                Work::Over => {}
            }
        }
    }

    /// One effect of somebody who recovers.
    pub(crate) fn recover(&mut self, index: usize) {
        let one = &self.recoverers[index];
        let at = one.at;
        let (what, came) = match one.work {
            Work::Over => return,
            Work::Source(ops) => match ops.get(at) {
                Some(op) => (format!("{op:?}"), self.recover_source(index, *op)),
                None => (String::new(), Came::Over(())),
            },
            Work::Destination(ops) => match ops.get(at) {
                Some(op) => (format!("{op:?}"), self.recover_destination(index, *op)),
                None => (String::new(), Came::Over(())),
            },
        };
        self.time_passes();
        if came != Came::Waits {
            self.note(|| format!("recovering {what}: {came:?}"));
        }
        match came {
            Came::Waits => {}
            Came::Next => self.recoverers[index].at += 1,
            Came::Over(()) => {
                self.drop_claim(index);
                self.recoverers[index].end();
            }
        }
    }

    fn recover_source(&mut self, index: usize, op: SourceOp) -> Came<()> {
        match op {
            SourceOp::Decide => {
                if self.driver.is_at_work() {
                    return Came::Over(());
                }
                if self.source.claimed {
                    return Came::Waits;
                }
                let Some(stage) = self.source.record else {
                    return Came::Over(());
                };
                self.source.claimed = true;
                self.recoverers[index].holds_claim = true;
                let next = (self.rules.dead_source)(stage);
                self.goes_on(index, next)
            }
            SourceOp::Ask => {
                let link = self.connect(true);
                self.recoverers[index].question = Some(link);
                self.recoverers[index].tries += 1;
                self.send(Some(link), true, Message::Verdict);
                Came::Next
            }
            SourceOp::Told => {
                let Some(link) = self.recoverers[index].question else {
                    return Came::Over(());
                };
                let said = match self.read(link, true) {
                    Read::Nothing => return Came::Waits,
                    Read::Message(Message::VerdictIs(stage)) => (self.rules.told)(stage),
                    Read::Message(_) | Read::Gone => None,
                };
                self.links[link].closed_by_source = true;
                match said {
                    Some(next) => self.goes_on(index, next),
                    None if self.recoverers[index].tries < TRIES => {
                        self.recoverers[index].at = 0;
                        Came::Waits
                    }
                    None => Came::Over(()),
                }
            }
            SourceOp::AwaitCriu if self.source.criu => Came::Waits,
            SourceOp::AwaitCriu => Came::Next,
            // Only an answer makes it write; the record says the rest already.
            SourceOp::WriteUndone | SourceOp::WriteDone => {
                let stage = if op == SourceOp::WriteDone {
                    Stage::Done
                } else {
                    Stage::Undone
                };
                if self.source.record == Some(Stage::HandedOver) {
                    self.source.record = Some(stage);
                }
                Came::Next
            }
            other => {
                self.touch_source(other);
                Came::Next
            }
        }
    }

    fn goes_on(&mut self, index: usize, next: recovery::Source) -> Came<()> {
        let ops = match next {
            recovery::Source::TakeBack => ops::BACK_HERE,
            recovery::Source::Remove => ops::REMOVE_TREE,
            recovery::Source::Ask => ops::ASK,
        };
        self.recoverers[index].goes_on_with(Work::Source(ops));
        Came::Waits
    }

    fn recover_destination(&mut self, index: usize, op: DestinationOp) -> Came<()> {
        let examined = match op {
            DestinationOp::Decide => {
                if !self.destination.ownerless {
                    return Came::Over(());
                }
                if self.destination.claimed {
                    return Came::Waits;
                }
                let Some(stage) = self.destination.record else {
                    return Came::Over(());
                };
                self.destination.claimed = true;
                self.recoverers[index].holds_claim = true;
                (self.rules.dead_destination)(stage)
            }
            DestinationOp::Examine => {
                let host = &self.destination;
                let found = Evidence {
                    let_go: host.noted,
                    alive: host.copy != Copy::None,
                    connected: usize::from(host.copy != Copy::None),
                    in_repair: usize::from(host.copy == Copy::Held),
                    complete: true,
                };
                match (self.rules.examined)(found) {
                    Some(next) => next,
                    None => return Came::Over(()),
                }
            }
            DestinationOp::Unnote => {
                self.destination.noted = false;
                return Came::Next;
            }
            DestinationOp::AwaitCriu => {
                return if self.destination.criu {
                    Came::Waits
                } else {
                    Came::Next
                };
            }
            DestinationOp::WriteDone => {
                self.destination.record = Some(Stage::Done);
                return Came::Next;
            }
            DestinationOp::WriteUndone => {
                self.destination.record = Some(Stage::Undone);
                return Came::Next;
            }
            other => {
                self.touch_destination(other);
                return Came::Next;
            }
        };
        let ops = match examined {
            recovery::Destination::Remove if self.destination.record == Some(Stage::Owned) => {
                ops::GIVE_BACK
            }
            recovery::Destination::Remove => ops::REMOVE_COPY,
            recovery::Destination::Open => ops::OPEN_HERE,
            recovery::Destination::Examine => ops::EXAMINE,
        };
        self.recoverers[index].goes_on_with(Work::Destination(ops));
        Came::Waits
    }
}
