//! What a dead orchestrator or agent has left, brought to its one right end.
//!
//! What is right says [`migrate_core::protocol::recovery`]; here it is found
//! out and done.
//!
//! Only records of dead owners are touched, each by one process at a time, and
//! every step may have been done before: whoever comes after a crash of this
//! does it again.

use std::fmt::Display;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use migrate_core::journal::{Record, Route, Side, Stage};
use migrate_core::protocol::recovery::{self, Evidence};
use migrate_gate::{GateError, Role};
use migrate_net::{Net, NetError, Withdrawn};
use migrate_proc::{Fence, FenceRecord, HoldDown, HoldDownRecord, Home, TcpSockets};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, chain};
use crate::images::{ImagePlace, images_in};
use crate::journal;
use crate::park::Place;
use crate::progress::Reporter;
use crate::source::verdict;
use crate::state::State;
use crate::sweep::owner_alive;

/// How long a CRIU whose owner is dead may take to undo what it did, before it
/// is killed.
const CRIU_LIMIT: Duration = Duration::from_secs(10);

/// How long another process may take to settle a record.
const CLAIM_LIMIT: Duration = Duration::from_secs(30);

/// Nothing tells of these changes; they are looked for at this interval.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How often a destination that has not made up its mind is asked.
const TRIES: u32 = 5;

/// Where the tree of a settled record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It runs on this host.
    RunsHere,
    /// It runs, or ran last, on the other host.
    RunsThere,
    /// It does not run on the source, and nothing proves whether it runs on
    /// the destination.
    Undecided,
    /// The process that moves it lives, or another one is settling it.
    UnderWay,
}

/// What was found of a migration, and what was done about it.
#[derive(Debug, Clone, Serialize)]
pub struct Recovered {
    /// The migration.
    pub migration_id: String,
    /// Which side this host was.
    pub side: Side,
    /// Root of the tree.
    pub root_pid: i32,
    /// Its name.
    pub name: String,
    /// The other host.
    pub peer: String,
    /// What was found.
    pub found: String,
    /// Where the tree is.
    pub outcome: Outcome,
    /// What was done, in order.
    pub done: Vec<String>,
    /// What could not be done.
    pub left: Vec<String>,
}

impl Recovered {
    pub(crate) fn log(&self) {
        let Self {
            migration_id: id,
            side,
            found,
            ..
        } = self;
        for done in &self.done {
            tracing::info!(id, ?side, found, done, "cleared a dead owner's leftovers");
        }
        for left in &self.left {
            tracing::warn!(id, ?side, found, left, "a dead owner's leftovers stay");
        }
    }
}

/// Settles every record of this host whose owner is dead, or those of one
/// migration or tree.
///
/// # Errors
///
/// The journal cannot be read.
pub async fn recover(
    state: &State,
    wanted: impl Fn(&Record) -> bool,
    reporter: &Reporter,
) -> Result<Vec<Recovered>, Error> {
    let mut settled = Vec::new();
    for record in journal::all(state)? {
        if wanted(&record) {
            settled.push(settle(state, &record, Some(reporter)).await);
        }
    }
    Ok(settled)
}

/// Settles the record of a destination's task that has come to nothing while
/// its process lives.
pub async fn abandoned(migration_id: &str) {
    let record = State::open().and_then(|state| {
        let record = journal::read(&state, migration_id, Side::Destination)?;
        let Some(mut record) = record else {
            return Ok(None);
        };
        // From here on it has no owner.
        record.owner_pid = 0;
        let stage = record.stage;
        journal::close(&state, &mut record, stage)?;
        Ok(Some((state, record)))
    });
    match record {
        Ok(Some((state, record))) => settle(&state, &record, None).await.log(),
        Ok(None) => {}
        Err(error) => tracing::warn!(error = %error.chain(), "could not clear up"),
    }
}

/// Settles one record. The destination is only asked when there is somebody
/// to tell about it.
pub(crate) async fn settle(state: &State, record: &Record, ask: Option<&Reporter>) -> Recovered {
    let mut case = Case {
        state,
        record: record.clone(),
        done: Vec::new(),
        left: Vec::new(),
    };
    let (found, outcome) = case.settle(ask).await;
    Recovered {
        migration_id: case.record.migration_id,
        side: case.record.side,
        root_pid: case.record.root_pid,
        name: case.record.name,
        peer: case.record.peer,
        found,
        outcome,
        done: case.done,
        left: case.left,
    }
}

/// One record that is being settled.
struct Case<'a> {
    state: &'a State,
    record: Record,
    done: Vec<String>,
    left: Vec<String>,
}

type Settled = (String, Outcome);

impl Case<'_> {
    async fn settle(&mut self, ask: Option<&Reporter>) -> Settled {
        let deadline = Instant::now() + CLAIM_LIMIT;
        let _claim = loop {
            if owner_alive(&self.record) {
                let found = format!("process {} is moving it", self.record.owner_pid);
                return (found, Outcome::UnderWay);
            }
            match journal::claim(self.state, &self.record) {
                Ok(Some(claim)) => break claim,
                Ok(None) if Instant::now() < deadline => {
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
                Ok(None) => {
                    let found = "another process is settling it".to_owned();
                    return (found, Outcome::UnderWay);
                }
                Err(error) => {
                    self.left.push(error.chain());
                    return ("a record".to_owned(), Outcome::Undecided);
                }
            }
        };
        let id = &self.record.migration_id;
        match journal::read(self.state, id, self.record.side) {
            Ok(Some(record)) => self.record = record,
            // Settled meanwhile, or read by somebody else's account.
            Ok(None) => return self.already(),
            Err(error) => {
                self.left.push(error.chain());
                return ("a record".to_owned(), Outcome::Undecided);
            }
        }
        let stage = self.record.stage;
        match self.record.side {
            Side::Source => match recovery::source(stage) {
                recovery::Source::TakeBack => {
                    self.back_here().await;
                    let found = "the command that moved it has died before the commit";
                    (found.to_owned(), self.if_done(Outcome::RunsHere))
                }
                recovery::Source::Remove => {
                    self.remove_tree().await;
                    let found = "moved, with something left behind";
                    (found.to_owned(), Outcome::RunsThere)
                }
                recovery::Source::Ask => self.ask(ask).await,
            },
            Side::Destination => match recovery::destination(stage) {
                recovery::Destination::Examine => self.owned().await,
                recovery::Destination::Open => {
                    self.open_here().await;
                    let found = "moved here, and runs";
                    (found.to_owned(), Outcome::RunsHere)
                }
                recovery::Destination::Remove => {
                    self.remove_copy().await;
                    let found = "the agent has died before the commit";
                    (found.to_owned(), Outcome::RunsThere)
                }
            },
        }
    }

    fn already(&self) -> Settled {
        let outcome = match migrate_proc::start_ticks(self.record.root_pid) {
            Some(_) => Outcome::RunsHere,
            None => Outcome::RunsThere,
        };
        ("settled by another process meanwhile".to_owned(), outcome)
    }

    fn if_done(&self, outcome: Outcome) -> Outcome {
        if self.left.is_empty() {
            outcome
        } else {
            Outcome::Undecided
        }
    }

    fn note<T, E: std::error::Error>(
        &mut self,
        what: impl Display,
        result: Result<T, E>,
    ) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.left
                    .push(format!("could not {what}: {}", chain(&error)));
                None
            }
        }
    }

    fn parsed<T: DeserializeOwned>(&mut self, what: &str, text: Option<String>) -> Option<T> {
        let parsed = serde_json::from_str(&text?);
        self.note(format!("read {what} on record"), parsed)
    }

    // ---- source

    /// The destination's word decides.
    async fn ask(&mut self, ask: Option<&Reporter>) -> Settled {
        let found = format!("handed over to {}", self.record.peer);
        let Some(reporter) = ask else {
            return (found, Outcome::Undecided);
        };
        let answer = match (&self.record.route, self.parked()) {
            (_, Some(place)) => crate::park::verdict(&place, &self.record.migration_id).await,
            (Some(route), None) => ask_until_settled(route, &self.record, reporter).await,
            (None, None) => Err(Error::Changed(
                "the record does not say how to reach it".to_owned(),
            )),
        };
        match answer {
            Ok(stage) => match recovery::told(stage) {
                Some(recovery::Source::Remove) => {
                    let found = format!("{found}, which runs it");
                    if !self.close(Stage::Done) {
                        return (found, Outcome::Undecided);
                    }
                    self.remove_tree().await;
                    (found, Outcome::RunsThere)
                }
                Some(recovery::Source::TakeBack) => {
                    let found =
                        format!("{found}, which has put on record that it never will run it");
                    if !self.close(Stage::Undone) {
                        return (found, Outcome::Undecided);
                    }
                    self.back_here().await;
                    (found, self.if_done(Outcome::RunsHere))
                }
                Some(recovery::Source::Ask) | None => {
                    self.left.push(format!(
                        "{} owns it and does not say that it runs ({stage:?})",
                        self.record.peer
                    ));
                    (found, Outcome::Undecided)
                }
            },
            Err(error) => {
                self.left
                    .push(format!("no word from it: {}", error.chain()));
                (found, Outcome::Undecided)
            }
        }
    }

    /// The directory that the tree went to, if it went to one. Its gate waits
    /// for it to come back.
    fn parked(&self) -> Option<Place> {
        Place::of_route(&self.record.route.as_ref()?.to)
    }

    fn close(&mut self, stage: Stage) -> bool {
        let closed = journal::close(self.state, &mut self.record, stage);
        self.note("write the record", closed).is_some()
    }

    fn fence(&mut self) -> Option<Fence> {
        let text = self.record.fence.clone();
        self.parsed::<FenceRecord>("the fence", text)
            .map(Fence::from_record)
    }

    /// The tree runs here again, with its connections.
    async fn back_here(&mut self) {
        let fence = self.fence();
        let pids = match &fence {
            Some(fence) => {
                let living = fence.living();
                self.note("find the tree", living).unwrap_or_default()
            }
            None => Vec::new(),
        };
        self.await_criu(&pids, fence.as_ref()).await;
        self.put_addresses_back().await;
        // Before anything of the tree runs: it would close what it cannot use.
        let healed = TcpSockets::of(&pids).and_then(|sockets| sockets.heal());
        if let Some(healed) = self.note("take connections out of repair mode", healed)
            && healed > 0
        {
            self.done.push(format!(
                "{healed} connections that CRIU had left in repair mode work again"
            ));
        }
        if let Some(fence) = fence {
            let opened = fence.open().and_then(|()| fence.release());
            if self.note("open the fence", opened).is_some() && !pids.is_empty() {
                self.done.push("the fence is open".to_owned());
            }
        }
        self.give_unit_back(HoldDown::release);
        self.remove_lock();
        self.remove_gate(Role::Source);
        self.remove_images();
        if let Some(place) = self.parked().filter(Place::is_stub) {
            let forgotten = crate::park::forget(&place, &self.record.migration_id);
            if let Err(error) = forgotten {
                self.left
                    .push(format!("could not remove the stub: {}", error.chain()));
            }
        }
        self.forget();
    }

    /// CRIU undoes what it did when its owner is gone. One that does not come
    /// to an end is killed, behind a closed fence.
    async fn await_criu(&mut self, pids: &[i32], fence: Option<&Fence>) {
        let deadline = Instant::now() + CRIU_LIMIT;
        loop {
            let tracer = match migrate_proc::tracer(pids) {
                Ok(Some((pid, name))) if name == "criu" => pid,
                Ok(_) => return,
                Err(error) => {
                    self.left.push(chain(&error));
                    return;
                }
            };
            if Instant::now() < deadline {
                tokio::time::sleep(LOOK_INTERVAL).await;
                continue;
            }
            if let Some(fence) = fence {
                let closed = fence.close();
                self.note("close the fence", closed);
            }
            let killed = migrate_proc::kill_tree(&[tracer]);
            if self
                .note("kill the CRIU that holds the tree", killed)
                .is_some()
            {
                self.done
                    .push(format!("CRIU ({tracer}) hung and was killed"));
            }
            return;
        }
    }

    async fn put_addresses_back(&mut self) {
        let text = self.record.withdrawn.clone();
        let Some(withdrawn) = self.parsed::<Vec<Withdrawn>>("the addresses", text) else {
            return;
        };
        let Some(net) = self.net().await else {
            return;
        };
        for address in withdrawn.iter().rev() {
            let placed = net.placed(address.ip).await;
            let was_here = self
                .note("look for the address", placed)
                .flatten()
                .is_some();
            let what = format!("put {} back", address.ip);
            let restored = net.restore(address).await;
            if self.note(what, restored).is_none() || was_here {
                continue;
            }
            self.done.push(format!("{} is back", address.ip));
            // The destination may have announced it.
            let placed = net.placed(address.ip).await;
            if let Some(Some(placement)) = self.note("look for the address", placed) {
                let announced = net.announce(&[placement]).await;
                self.note("announce the address", announced);
            }
        }
    }

    async fn net(&mut self) -> Option<Net> {
        let net = Net::open().await;
        self.note("open netlink", net)
    }

    /// The tree runs elsewhere: what stands here ends without a word.
    async fn remove_tree(&mut self) {
        let fence = self.fence();
        if let Some(fence) = &fence {
            let living = fence.living();
            let pids = self.note("find the tree", living).unwrap_or_default();
            if !pids.is_empty() {
                let closed = fence.close();
                self.note("close the fence", closed);
                self.await_criu(&pids, Some(fence)).await;
                let ended = end_silently(fence);
                if self.note("end the frozen tree", ended).is_none() {
                    // What the kernel would say for it stays behind the gate.
                    return;
                }
                self.done.push("the frozen tree is gone".to_owned());
            }
        }
        if let Some(net) = self.net().await {
            for address in self.record.addresses.clone() {
                match net.withdraw(&address).await {
                    Ok(_) | Err(NetError::NotHere { .. }) => {}
                    Err(error) => {
                        self.left.push(format!(
                            "could not withdraw {}: {}",
                            address.ip,
                            chain(&error)
                        ));
                    }
                }
            }
        }
        if let Some(fence) = fence {
            let released = fence.release();
            self.note("remove the fence", released);
        }
        self.give_unit_back(HoldDown::release_after_end);
        self.remove_lock();
        if self.parked().is_none() {
            self.remove_gate(Role::Source);
        }
        self.remove_images();
        self.forget();
    }

    fn give_unit_back(
        &mut self,
        release: impl FnOnce(HoldDown) -> Result<(), migrate_proc::ProcError>,
    ) {
        let text = self.record.hold_down.clone();
        if let Some(held) = self.parsed::<HoldDownRecord>("who is held down", text) {
            let released = release(HoldDown::from_record(Some(held)));
            self.note("give the unit back to systemd", released);
        }
    }

    // ---- destination

    fn home(&self) -> Option<Home> {
        let path = self.record.home.as_deref()?;
        (!path.is_empty()).then(|| Home::from_record(path))
    }

    /// What lives in the copy's own cgroup and has its PIDs, once CRIU has
    /// ended there.
    async fn copy(&mut self) -> Vec<i32> {
        let Some(home) = self.home() else {
            return Vec::new();
        };
        let deadline = Instant::now() + CRIU_LIMIT;
        loop {
            // It may have been on its way there a moment ago.
            if let Some(images) = &self.record.images {
                migrate_criu::dismiss_parked(&images_in(Path::new(images)));
            }
            match home.named("criu") {
                Ok(pids) if pids.is_empty() => break,
                Ok(_) if Instant::now() < deadline => tokio::time::sleep(LOOK_INTERVAL).await,
                Ok(pids) => {
                    let killed = migrate_proc::kill_tree(&pids);
                    self.note("kill a CRIU that hangs", killed);
                    break;
                }
                Err(error) => {
                    self.left.push(chain(&error));
                    break;
                }
            }
        }
        let living = home.living(&self.record.pids);
        self.note("find the copy", living).unwrap_or_default()
    }

    /// Tells a copy that runs from one that has never run.
    async fn owned(&mut self) -> Settled {
        let let_go = journal::was_let_go(self.state, &self.record);
        let copy = self.copy().await;
        let sockets = TcpSockets::of(&copy);
        let sockets = self.note("find its connections", sockets);
        let (connected, in_repair) =
            sockets.map_or((0, 0), |sockets| (sockets.connected(), sockets.in_repair()));
        let found = recovery::examined(Evidence {
            let_go,
            alive: !copy.is_empty(),
            connected,
            in_repair,
            complete: self.left.is_empty(),
        });
        match found {
            Some(recovery::Destination::Remove) => {
                let found =
                    "the agent has died after the commit, before the copy's first instruction";
                self.remove_copy().await;
                if self.record.stage == Stage::Undone {
                    self.done
                        .push(format!("{} may take it back", self.record.peer));
                }
                return (found.to_owned(), Outcome::RunsThere);
            }
            Some(recovery::Destination::Examine) | None => {
                self.left.push(
                    "the copy was let go and is not there: it has ended, or was lost with its agent"
                        .to_owned(),
                );
                let found = "the agent has died after the commit";
                return (found.to_owned(), Outcome::Undecided);
            }
            Some(recovery::Destination::Open) => {}
        }
        let found = "the agent has died after the commit, and the copy runs";
        if self.close(Stage::Done) {
            self.open_here().await;
            self.announce().await;
        }
        (found.to_owned(), Outcome::RunsHere)
    }

    async fn announce(&mut self) {
        let Some(net) = self.net().await else {
            return;
        };
        for address in self.record.addresses.clone() {
            let placed = net.placed(address.ip).await;
            if let Some(Some(placement)) = self.note("look for the address", placed) {
                let announced = net.announce(&[placement]).await;
                self.note("announce the address", announced);
            }
        }
    }

    /// The copy runs: nothing may stand in its way, and its memory not lie
    /// about. The record stays for a late question.
    async fn open_here(&mut self) {
        self.remove_gate(Role::Destination);
        self.remove_images();
    }

    /// The copy has not run and never will.
    ///
    /// A record that says `Owned` says so until the address has gone: it may
    /// have been announced, and the source takes it back as soon as it hears
    /// `Undone`. Any other is closed first, so that nobody can own the tree.
    async fn remove_copy(&mut self) {
        let owned = self.record.stage == Stage::Owned;
        if owned {
            // What has been proved stays proved when the copy is gone.
            let forgotten = journal::forget_note(self.state, &self.record);
            if self
                .note("note that the copy has not run", forgotten)
                .is_none()
            {
                return;
            }
        } else if self.record.stage != Stage::Undone && !self.close(Stage::Undone) {
            return;
        }
        let copy = self.copy().await;
        if !copy.is_empty() {
            // Restored sockets may be out of repair mode only when it ran.
            let killed = migrate_proc::kill_tree(&copy);
            if self.note("kill the copy", killed).is_some() {
                self.done.push("a half-made copy is gone".to_owned());
            }
        }
        Home::clear(
            &self.record.name,
            self.record.root_pid,
            &self.record.migration_id,
        );
        // The address goes before the gate does: nothing may answer for it.
        if let Some(net) = self.net().await {
            for address in self.record.addresses.clone() {
                match net.withdraw(&address).await {
                    Ok(_) => self
                        .done
                        .push(format!("{} is not here any more", address.ip)),
                    // On record before it was staged.
                    Err(NetError::NotHere { .. }) => {}
                    Err(error) => {
                        self.left.push(format!(
                            "could not withdraw {}: {}",
                            address.ip,
                            chain(&error)
                        ));
                    }
                }
            }
        }
        self.remove_gate(Role::Destination);
        self.remove_images();
        if owned && !(self.left.is_empty() && self.close(Stage::Undone)) {
            return;
        }
        self.forget();
    }

    // ---- both

    /// What CRIU's own lock has left of it.
    fn remove_lock(&mut self) {
        let addresses: Vec<IpAddr> = self.record.addresses.iter().map(|a| a.ip).collect();
        let cleared = crate::criu_lock(self.record.network_lock).clear(&addresses);
        if let Some(1..) = self.note("remove CRIU's network lock", cleared) {
            self.done.push("CRIU's network lock is gone".to_owned());
        }
    }

    fn remove_gate(&mut self, role: Role) {
        match migrate_gate::unlock(&self.state.gates(), &self.record.migration_id, role) {
            Ok(()) => self.done.push("the gate is gone".to_owned()),
            Err(GateError::NotFound { .. }) => {}
            Err(error) => {
                self.left
                    .push(format!("could not remove the gate: {}", chain(&error)));
            }
        }
    }

    fn remove_images(&mut self) {
        let Some(images) = &self.record.images else {
            return;
        };
        match ImagePlace::remove(Path::new(images)) {
            Ok(()) => self.done.push("the images are gone".to_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => self
                .left
                .push(format!("could not remove {images}: {error}")),
        }
    }

    /// What is left is known to the next one by the record alone.
    fn forget(&mut self) {
        if self.left.is_empty() {
            journal::remove(self.state, &self.record);
        }
    }
}

/// Ends a tree that is fenced and runs elsewhere, when its CRIU cannot: its
/// connections end without a FIN or RST.
pub(crate) fn end_silently(fence: &Fence) -> Result<(), migrate_proc::ProcError> {
    let pids = fence.living()?;
    // Held until the tree has ended: the last to close decides what is said.
    let sockets = TcpSockets::of(&pids)?;
    sockets.silence()?;
    migrate_proc::kill_tree(&pids)
}

/// Asks until the answer is final, or too often.
async fn ask_until_settled(
    route: &Route,
    record: &Record,
    reporter: &Reporter,
) -> Result<Stage, Error> {
    let destination = verdict::destination(route)?;
    let mut last = Err(Error::Changed("it was not asked".to_owned()));
    for attempt in 0..TRIES {
        if attempt > 0 {
            tokio::time::sleep(verdict::PAUSE).await;
        }
        last = verdict::ask(&destination, &record.migration_id, &record.peer, reporter)
            .await
            .map(|(_, stage)| stage);
        if matches!(last, Ok(stage) if recovery::told(stage).is_some()) {
            break;
        }
    }
    last
}
