//! Two hosts, the connections between them, and what can happen to them.

use std::collections::VecDeque;

use migrate_core::journal::Stage;

use crate::actors::{Driver, Recoverer, Server};
use crate::random::Random;
use crate::{Breach, Ending, Failure, Rules};

/// A message of the protocol, as far as the order of things depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    Findings,
    Prepare,
    Prepared,
    Pages,
    Dumped,
    Restored,
    Go,
    Owned,
    Running,
    Verdict,
    VerdictIs(Stage),
}

/// One connection. What is in it arrives at any later time or never.
#[derive(Debug, Clone, Default)]
pub(crate) struct Link {
    pub(crate) to_destination: VecDeque<Message>,
    pub(crate) to_source: VecDeque<Message>,
    pub(crate) closed_by_source: bool,
    pub(crate) closed_by_destination: bool,
    pub(crate) cut: bool,
}

/// What a gate does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    None,
    Open,
    /// Closed; opens by itself when its owner is dead and it is leased.
    Closed {
        leased: bool,
    },
}

/// The source host.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) alive: bool,
    /// Held by CRIU.
    pub(crate) seized: bool,
    pub(crate) fenced: bool,
    /// The state that the copy is made from.
    pub(crate) dumped: bool,
    /// It has run since.
    pub(crate) went_on: bool,
    pub(crate) criu: bool,
    pub(crate) gate: Gate,
    pub(crate) address: bool,
    pub(crate) record: Option<Stage>,
    pub(crate) claimed: bool,
}

impl Source {
    pub(crate) fn runs(&self) -> bool {
        self.alive && !self.seized && !self.fenced
    }

    fn is_open(&self) -> bool {
        !matches!(self.gate, Gate::Closed { .. })
    }

    fn answers(&self) -> bool {
        self.address && self.is_open()
    }
}

/// What there is of the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copy {
    None,
    /// Complete, its sockets in repair mode.
    Held,
    /// Its sockets live; it has not run an instruction.
    Live,
    Running,
}

/// Memory that goes over after the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Late {
    /// None is to, or all of it has.
    None,
    /// The copy cannot do without it.
    Missing,
    /// It never will: the copy is killed.
    Lost,
}

/// The destination host.
#[derive(Debug, Clone)]
pub(crate) struct Destination {
    pub(crate) copy: Copy,
    /// It has run, whatever became of it.
    pub(crate) ran: bool,
    /// It has run or died after it was let go.
    pub(crate) let_go_in_vain: bool,
    /// It was killed for want of memory.
    pub(crate) starved: bool,
    pub(crate) criu: bool,
    pub(crate) gate: Gate,
    /// The address is here, silently.
    pub(crate) staged: bool,
    pub(crate) announced: bool,
    pub(crate) record: Option<Stage>,
    pub(crate) noted: bool,
    /// The record's owner is dead or has given it up.
    pub(crate) ownerless: bool,
    pub(crate) claimed: bool,
}

/// Everything.
pub(crate) struct World<'a> {
    pub(crate) rules: &'a Rules,
    pub(crate) random: Random,
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(crate) late: Late,
    pub(crate) links: Vec<Link>,
    pub(crate) driver: Driver,
    pub(crate) servers: Vec<Server>,
    pub(crate) recoverers: Vec<Recoverer>,
    /// Bad luck that is left, and the effect before which there is none.
    pub(crate) faults: u32,
    lucky_until: u32,
    /// No connection can be made for so many looks of nature.
    pub(crate) down: u32,
    seed: u64,
    effects: u32,
    trace: Option<Vec<String>>,
}

/// More effects than any run that comes to an end has made, ten times over.
const EFFECTS_MAX: u32 = 20_000;

/// Effects of a run in which nothing fails, about.
const EFFECTS_USUAL: usize = 300;

/// How long the network is down at most, in looks of nature. A question that
/// is asked several times meanwhile stays unanswered.
const DOWN_MAX: usize = 100;

/// Faults in one run: with more, most runs end before they begin.
const FAULTS_MAX: usize = 5;

/// How often `recover` is run on both hosts in the end.
const RECOVERIES: u32 = 2;

/// Lines of a trace that are kept.
const TRACE_MAX: usize = 2_000;

impl<'a> World<'a> {
    pub(crate) fn new(seed: u64, rules: &'a Rules, trace: bool) -> Self {
        let mut random = Random::new(seed);
        let mut below = |bound| u32::try_from(random.below(bound)).unwrap_or(0);
        let faults = below(FAULTS_MAX);
        // Most of a run is before the handover, most of what can go wrong is not.
        let lucky_until = below(EFFECTS_USUAL);
        Self {
            rules,
            random,
            source: Source {
                alive: true,
                seized: false,
                fenced: false,
                dumped: false,
                went_on: false,
                criu: false,
                gate: Gate::None,
                address: true,
                record: None,
                claimed: false,
            },
            destination: Destination {
                copy: Copy::None,
                ran: false,
                let_go_in_vain: false,
                starved: false,
                criu: false,
                gate: Gate::None,
                staged: false,
                announced: false,
                record: None,
                noted: false,
                ownerless: false,
                claimed: false,
            },
            late: Late::None,
            links: Vec::new(),
            driver: Driver::new(),
            servers: Vec::new(),
            recoverers: Vec::new(),
            faults,
            lucky_until,
            down: 0,
            seed,
            effects: 0,
            trace: trace.then(Vec::new),
        }
    }

    pub(crate) fn run(mut self) -> Result<Ending, Failure> {
        let ended = self.play();
        ended.map_err(|breach| Failure {
            seed: self.seed,
            at: self.effects,
            breach,
            trace: self.trace.unwrap_or_default(),
        })
    }

    fn play(&mut self) -> Result<Ending, Breach> {
        self.until_quiet()?;
        // The network is whole and nothing fails any more: `recover` has to
        // find the one right end.
        self.faults = 0;
        self.down = 0;
        for _ in 0..RECOVERIES {
            self.recoverers.push(Recoverer::destination());
            self.recoverers.push(Recoverer::source());
            self.recoverers.push(Recoverer::source());
            self.until_quiet()?;
        }
        self.judge()
    }

    fn until_quiet(&mut self) -> Result<(), Breach> {
        loop {
            self.check()?;
            self.effects += 1;
            if self.effects > EFFECTS_MAX {
                return Err(Breach::Endless);
            }
            if self.faults > 0 && self.effects > self.lucky_until && self.random.one_in(24) {
                self.faults -= 1;
                self.strike();
                continue;
            }
            self.servers.retain(Server::is_at_work);
            self.recoverers.retain(|one| !one.is_over());
            let actors = 2 + self.servers.len() + self.recoverers.len();
            if !self.something_is_left() {
                return Ok(());
            }
            match self.random.below(actors) {
                0 => self.nature(),
                1 => self.drive()?,
                n if n < 2 + self.servers.len() => self.serve(n - 2)?,
                n => self.recover(n - 2 - self.servers.len()),
            }
        }
    }

    fn something_is_left(&self) -> bool {
        self.driver.is_at_work()
            || self.servers.iter().any(Server::is_at_work)
            || self.recoverers.iter().any(|one| !one.is_over())
            || self.nature_has_work()
    }

    fn nature_has_work(&self) -> bool {
        (!self.driver.is_at_work() && (self.source.criu || self.is_leased()))
            || (self.agent_is_dead() && self.destination.criu)
            || (!self.driver.is_at_work() && self.late == Late::Missing)
            || self.starves()
    }

    fn starves(&self) -> bool {
        self.late == Late::Lost && self.destination.copy != Copy::None
    }

    /// Nobody brings it any more.
    pub(crate) fn lose_late(&mut self) {
        if self.late == Late::Missing {
            self.late = Late::Lost;
        }
    }

    fn is_leased(&self) -> bool {
        self.source.gate == Gate::Closed { leased: true }
    }

    pub(crate) fn agent_is_dead(&self) -> bool {
        self.servers
            .iter()
            .all(|one| !one.is_at_work() || one.asked)
    }

    /// What kernels and CRIU do by themselves when their owner is dead.
    fn nature(&mut self) {
        self.down = self.down.saturating_sub(1);
        if !self.driver.is_at_work() {
            self.lose_late();
        }
        if self.starves() && self.random.one_in(2) {
            self.note(|| "the copy is killed for want of memory".to_owned());
            let host = &mut self.destination;
            host.starved |= host.copy == Copy::Running;
            host.let_go_in_vain |= host.copy == Copy::Live || host.noted;
            host.copy = Copy::None;
            host.criu = false;
        } else if !self.driver.is_at_work() && self.source.criu && self.random.one_in(2) {
            self.note(|| "CRIU lets go of the tree".to_owned());
            self.source.criu = false;
            self.source.seized = false;
        } else if !self.driver.is_at_work() && self.is_leased() {
            self.note(|| "the gate's deadline passes".to_owned());
            self.source.gate = Gate::Open;
        } else if self.agent_is_dead() && self.destination.criu {
            self.destination.criu = false;
            self.copy_without_criu();
        }
    }

    /// A copy whose CRIU has ended before it said that the copy runs.
    fn copy_without_criu(&mut self) {
        let host = &mut self.destination;
        match host.copy {
            Copy::Live if self.random.one_in(2) => {
                host.copy = Copy::Running;
                host.ran = true;
                self.note(|| "the copy runs although CRIU has ended".to_owned());
            }
            Copy::Live | Copy::Held => {
                host.let_go_in_vain |= host.copy == Copy::Live || host.noted;
                host.copy = Copy::None;
                self.note(|| "the copy dies with CRIU".to_owned());
            }
            Copy::None | Copy::Running => {}
        }
    }

    /// Something goes wrong.
    fn strike(&mut self) {
        match self.random.below(7) {
            0 if self.driver.is_at_work() => {
                self.note(|| "!! the driver dies".to_owned());
                self.driver.alive = false;
                self.lose_late();
                for link in self.driver.links() {
                    self.links[link].closed_by_source = true;
                }
                // Its guard, unless that was killed with it.
                if self.random.one_in(2) {
                    self.recoverers.push(Recoverer::source());
                }
            }
            1 => {
                self.note(|| "!! the agent dies".to_owned());
                let with_guard = self.random.one_in(2);
                // The keeper sees to it.
                self.lose_late();
                for server in self.servers.iter_mut().filter(|one| one.is_at_work()) {
                    server.alive = false;
                    self.links[server.link].closed_by_destination = true;
                    self.destination.ownerless |= !server.asked;
                }
                if with_guard {
                    self.recoverers.push(Recoverer::destination());
                }
            }
            2 if self.source.criu => {
                self.note(|| "!! the source's CRIU dies".to_owned());
                self.source.criu = false;
                self.source.seized = false;
            }
            3 if self.destination.criu => {
                self.note(|| "!! the destination's CRIU dies".to_owned());
                self.destination.criu = false;
                self.copy_without_criu();
            }
            4 => {
                self.note(|| "!! the network is cut".to_owned());
                self.lose_late();
                self.down = u32::try_from(self.random.below(DOWN_MAX)).unwrap_or(0);
                for link in &mut self.links {
                    link.cut = true;
                }
            }
            5 => {
                if let Some(link) = self.driver.links().first() {
                    let link = *link;
                    let keep = self.random.below(3);
                    self.note(|| format!("!! connection {link} breaks"));
                    let link = &mut self.links[link];
                    link.cut = true;
                    link.to_destination.truncate(keep);
                    link.to_source.truncate(keep);
                }
            }
            _ => self.give_up_somebody(),
        }
    }

    fn give_up_somebody(&mut self) {
        match self.recoverers.iter().position(|one| !one.is_over()) {
            Some(index) => {
                self.note(|| "!! a recovering process dies".to_owned());
                self.drop_claim(index);
                self.recoverers[index].end();
            }
            None => self.driver.cancelled = true,
        }
    }

    fn check(&self) -> Result<(), Breach> {
        let (source, destination) = (&self.source, &self.destination);
        let copy_runs = destination.copy == Copy::Running;
        if source.runs() && copy_runs {
            return Err(Breach::TwoRunners);
        }
        if destination.ran && source.went_on {
            return Err(Breach::Forked);
        }
        if source.answers() && destination.announced {
            return Err(Breach::TwoOwners);
        }
        if !source.alive && !destination.ran && !destination.let_go_in_vain {
            return Err(Breach::Lost);
        }
        if source.answers() && !source.alive {
            return Err(Breach::AnswersForNobody);
        }
        Ok(())
    }

    /// What is true when everybody has done their work.
    fn judge(&self) -> Result<Ending, Breach> {
        let (source, destination) = (&self.source, &self.destination);
        let copy_runs = destination.copy == Copy::Running;
        self.driver.was_right(self)?;
        match (source.runs(), copy_runs) {
            (false, false) if destination.starved => Ok(Ending::Lost),
            (true, false) => {
                if source.answers() && !destination.announced {
                    Ok(Ending::Stayed)
                } else {
                    Err(Breach::Unreached)
                }
            }
            (false, true) => {
                let open = !matches!(destination.gate, Gate::Closed { .. });
                if destination.announced && open {
                    Ok(Ending::Moved)
                } else {
                    Err(Breach::Unreached)
                }
            }
            // Nobody who comes later can prove that it has not run: it is not
            // there, and somebody was about to let it go.
            (false, false) if destination.let_go_in_vain || destination.noted => {
                Ok(Ending::Undecided)
            }
            _ => Err(Breach::NoRunner),
        }
    }

    pub(crate) fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace
            && trace.len() < TRACE_MAX
        {
            trace.push(format!("{:5} {}", self.effects, what()));
        }
    }

    /// Marks a tree that has gone on after it was dumped.
    pub(crate) fn time_passes(&mut self) {
        if self.source.dumped && self.source.runs() {
            self.source.went_on = true;
        }
    }
}
