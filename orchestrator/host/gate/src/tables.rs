//! The gate's maps, seen from user space.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray};
use aya::{Ebpf, EbpfLoader};
use migrate_core::{Flow, Listener};
use migrate_ebpf_common::key::{ANY_V4, ANY_V6, mapped};
use migrate_ebpf_common::state::{NEWCOMERS_MAX, expired};
use migrate_ebpf_common::{
    Counters, Direction, Ended, FlowKey, LAYOUT_VERSION, ListenerKey, Mode, State,
};

use crate::GateError;
use crate::flows::{FlowActivity, FlowCount, FlowTable, flow};
use crate::owner::Owner;
use crate::sys::{self, ControlPage};
use crate::trace;

/// The programs, built by build.rs.
static OBJECT: &[u8] = migrate_ebpf_objects::GATE;

pub(crate) const CONTROL: &str = "CONTROL";
const FLOWS: &str = "FLOWS";
const LISTENERS: &str = "LISTENERS";
const STAGED: &str = "STAGED";
const ENDED: &str = "ENDED";
const COUNTERS: &str = "COUNTERS";
const OWN_MARK: &str = "OWN_MARK";

/// A hash map and its size.
#[derive(Debug)]
struct KeySet {
    map: Map,
    /// What it holds, for messages.
    table: &'static str,
    capacity: u32,
}

impl KeySet {
    fn new(map: Map, table: &'static str) -> Result<Self, GateError> {
        let capacity = data(&map)
            .info()
            .map_err(|error| GateError::Load(error.into()))?
            .max_entries();
        Ok(Self {
            map,
            table,
            capacity,
        })
    }

    fn insert<K: aya::Pod>(&self, keys: &[K]) -> Result<(), GateError> {
        self.insert_as(keys, 0)
    }

    fn insert_as<K: aya::Pod>(&self, keys: &[K], value: u32) -> Result<(), GateError> {
        sys::insert_keys(descriptor(&self.map), keys, value).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::E2BIG) => GateError::Full {
                    table: self.table,
                    capacity: self.capacity,
                    asked: keys.len(),
                },
                _ => self.failed("change", source),
            }
        })
    }

    fn remove<K: aya::Pod>(&self, key: &K) -> Result<(), GateError> {
        sys::remove_key(descriptor(&self.map), key).map_err(|source| self.failed("change", source))
    }

    fn contains<K: aya::Pod>(&self, key: &K) -> Result<bool, GateError> {
        Ok(self.value(key)?.is_some())
    }

    fn value<K: aya::Pod>(&self, key: &K) -> Result<Option<u32>, GateError> {
        let failed = |error: MapError| self.failed("read", io::Error::other(error));
        let map = HashMap::<_, K, u32>::try_from(&self.map).map_err(failed)?;
        match map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    fn failed(&self, attempt: &'static str, source: io::Error) -> GateError {
        GateError::Map {
            attempt,
            table: self.table,
            source,
        }
    }
}

/// All maps of one gate.
#[derive(Debug)]
pub(crate) struct Tables {
    control_map: Map,
    control: ControlPage,
    flows: FlowTable,
    listeners: KeySet,
    staged: KeySet,
    ended: KeySet,
    /// Held while staged addresses and the flag that tells of them change.
    staging: Mutex<()>,
    counters: Map,
}

/// Loads the object: maps are made, programs still have to be verified.
/// `own_mark` is the mark of what user space gives back, not 0.
pub(crate) fn load(flow_capacity: u32, own_mark: u32) -> Result<(Ebpf, Tables), GateError> {
    let trace_level = trace::level();
    let mut ebpf = EbpfLoader::new()
        .override_global(aya_log::LEVEL, &trace_level, true)
        .override_global(OWN_MARK, &own_mark, true)
        .map_max_entries(FLOWS, flow_capacity.max(1).saturating_add(NEWCOMERS_MAX))
        .load(OBJECT)
        .map_err(|error| GateError::Load(error.into()))?;
    let tables = Tables::collect(|name| {
        ebpf.take_map(name)
            .ok_or_else(|| GateError::Load(format!("the object has no map {name}").into()))
    })?;
    tables
        .control
        .layout_version()
        .store(LAYOUT_VERSION, Ordering::Release);
    Ok((ebpf, tables))
}

impl Tables {
    fn collect(mut map: impl FnMut(&str) -> Result<Map, GateError>) -> Result<Self, GateError> {
        let control_map = map(CONTROL)?;
        let control = ControlPage::map(descriptor(&control_map))
            .map_err(|error| GateError::Load(error.into()))?;
        Ok(Self {
            control_map,
            control,
            flows: flow_table(map(FLOWS)?)?,
            listeners: KeySet::new(map(LISTENERS)?, "listeners")?,
            staged: KeySet::new(map(STAGED)?, "staged addresses")?,
            ended: KeySet::new(map(ENDED)?, "closed flows")?,
            staging: Mutex::new(()),
            counters: map(COUNTERS)?,
        })
    }

    /// Opens the maps pinned in a gate's directory.
    pub(crate) fn open(path: &Path) -> Result<Self, GateError> {
        let tables = Self::collect(|name| {
            let pin = path.join(name.to_lowercase());
            MapData::from_pin(&pin)
                .and_then(Map::from_map_data)
                .map_err(|error| GateError::OpenPin {
                    path: pin,
                    source: error.into(),
                })
        })?;
        let found = tables.control.layout_version().load(Ordering::Acquire);
        if found != LAYOUT_VERSION {
            return Err(GateError::Layout {
                path: path.to_owned(),
                found,
                known: LAYOUT_VERSION,
            });
        }
        Ok(tables)
    }

    /// Pins all maps, the control record first: with it alone a leftover can
    /// already be told whose it is.
    pub(crate) fn pin(&self, path: &Path) -> Result<(), GateError> {
        for (name, map) in [
            (CONTROL, &self.control_map),
            (FLOWS, self.flows.map()),
            (LISTENERS, &self.listeners.map),
            (STAGED, &self.staged.map),
            (ENDED, &self.ended.map),
            (COUNTERS, &self.counters),
        ] {
            let pin = path.join(name.to_lowercase());
            map.pin(&pin).map_err(|error| GateError::Pin {
                path: pin,
                source: error.into(),
            })?;
        }
        Ok(())
    }

    pub(crate) fn owner(&self) -> Owner {
        Owner {
            pid: u32::try_from(self.control.owner_pid().load(Ordering::Acquire)).unwrap_or(0),
            start_ticks: self.control.owner_start_ticks().load(Ordering::Acquire),
        }
    }

    pub(crate) fn set_owner(&self, owner: Owner) {
        let page = &self.control;
        page.owner_start_ticks()
            .store(owner.start_ticks, Ordering::Release);
        page.owner_pid().store(owner.pid.into(), Ordering::Release);
    }

    pub(crate) fn add_flows(&self, flows: &[Flow]) -> Result<(), GateError> {
        self.flows.add(flows)
    }

    /// Counts flows from now on.
    pub(crate) fn start_tracking(&self) {
        self.control
            .round_ns()
            .store(sys::coarse_ns(), Ordering::SeqCst);
        self.set_state(State::tracking);
    }

    /// Watches flows from now on, and notes what passes first.
    pub(crate) fn start_watching(&self) {
        self.control
            .mark_ns()
            .store(sys::now_ns(), Ordering::SeqCst);
        self.set_state(State::watching);
    }

    pub(crate) fn mark_ns(&self) -> u64 {
        self.control.mark_ns().load(Ordering::SeqCst)
    }

    pub(crate) fn next_round(&self) -> Result<FlowCount, GateError> {
        // The next round begins before this one is counted, so that no packet
        // falls between them.
        let round_ns = self
            .control
            .round_ns()
            .swap(sys::coarse_ns(), Ordering::SeqCst);
        self.flows.count(round_ns)
    }

    pub(crate) fn retain_flows(&self, flows: &[Flow]) -> Result<(), GateError> {
        let round_ns = self.control.round_ns().load(Ordering::SeqCst);
        let newcomers = self.flows.retain(flows, round_ns)?;
        self.control.newcomers().store(newcomers, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn count_flows(&self) -> Result<FlowCount, GateError> {
        let round_ns = self.control.round_ns().load(Ordering::SeqCst);
        self.flows.count(round_ns)
    }

    pub(crate) fn activity(
        &self,
        dropped: Option<&std::collections::HashMap<FlowKey, u32>>,
    ) -> Result<Vec<FlowActivity>, GateError> {
        self.flows.activity(dropped)
    }

    pub(crate) fn set_progress(&self, phase: u8, rounds: u32) {
        let progress = u64::from(rounds) << 8 | u64::from(phase);
        self.control.progress().store(progress, Ordering::Relaxed);
    }

    pub(crate) fn progress(&self) -> (u8, u32) {
        let progress = self.control.progress().load(Ordering::Relaxed);
        let [phase, ..] = progress.to_le_bytes();
        (phase, u32::try_from(progress >> 8).unwrap_or(u32::MAX))
    }

    pub(crate) fn add_listeners(&self, listeners: &[Listener]) -> Result<(), GateError> {
        let keys: Vec<ListenerKey> = listeners.iter().flat_map(listener_keys).collect();
        self.listeners.insert(&keys)
    }

    pub(crate) fn end_flows(&self, flows: &[Flow], how: Ended) -> Result<(), GateError> {
        if flows.is_empty() {
            return Ok(());
        }
        let keys: Vec<FlowKey> = flows.iter().map(flow_key).collect();
        let added = self.ended.insert_as(&keys, how as u32);
        // Also after a part of them.
        self.set_state(|state| state.with_ended(true));
        added
    }

    pub(crate) fn ended(&self, key: &FlowKey) -> Result<Option<Ended>, GateError> {
        if !self.state().has_ended() {
            return Ok(None);
        }
        Ok(self.ended.value(key)?.and_then(Ended::read))
    }

    pub(crate) fn forget_ended(&self, key: &FlowKey) -> Result<(), GateError> {
        self.ended.remove(key)
    }

    /// The flows whose peers are answered.
    pub(crate) fn answered(&self) -> Result<Vec<Flow>, GateError> {
        if !self.state().has_ended() {
            return Ok(Vec::new());
        }
        let failed = |error: MapError| self.ended.failed("read", io::Error::other(error));
        let map = HashMap::<_, FlowKey, u32>::try_from(&self.ended.map).map_err(failed)?;
        map.iter()
            .filter(
                |entry| !matches!(entry, Ok((_, how)) if Ended::read(*how) != Some(Ended::Answer)),
            )
            .map(|entry| entry.map(|(key, _)| flow(&key)).map_err(failed))
            .collect()
    }

    pub(crate) fn forget_all_ended(&self) {
        self.set_state(|state| state.with_ended(false));
    }

    pub(crate) fn stage(&self, addresses: &[IpAddr]) -> Result<(), GateError> {
        let _staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let keys: Vec<[u8; 16]> = addresses.iter().copied().map(address_key).collect();
        let staged = self.staged.insert(&keys);
        // Also after a part of them.
        self.set_state(|state| state.with_staged(true));
        staged
    }

    pub(crate) fn unstage(&self, addresses: &[IpAddr]) -> Result<(), GateError> {
        let _staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        addresses
            .iter()
            .copied()
            .try_for_each(|address| self.staged.remove(&address_key(address)))?;
        let left = HashMap::<_, [u8; 16], u32>::try_from(&self.staged.map)
            .map_err(|error| self.staged.failed("read", io::Error::other(error)))?;
        if left.keys().next().is_none() {
            self.set_state(|state| state.with_staged(false));
        }
        Ok(())
    }

    /// Whether the gate keeps packets of this flow back while it is closed.
    pub(crate) fn knows(&self, key: &FlowKey) -> Result<bool, GateError> {
        Ok(self.flows.contains(key)?
            || self.listeners.contains(&key.listener())?
            || self.listeners.contains(&key.wildcard_listener())?)
    }

    pub(crate) fn counters(&self) -> Result<Counters, GateError> {
        let failed = |error: MapError| GateError::Map {
            attempt: "read",
            table: "counters",
            source: io::Error::other(error),
        };
        let counters = PerCpuArray::<_, Counters>::try_from(&self.counters).map_err(failed)?;
        let per_cpu = counters.get(&0, 0).map_err(failed)?;
        Ok(per_cpu
            .iter()
            .copied()
            .fold(Counters::default(), Counters::plus))
    }

    pub(crate) fn state(&self) -> State {
        State(self.control.state().load(Ordering::SeqCst))
    }

    /// How much of the lease is left, `None` without one. Zero when it has
    /// run out.
    pub(crate) fn lease_left(&self) -> Option<Duration> {
        match self.control.deadline_ns().load(Ordering::SeqCst) {
            0 => None,
            deadline_ns => Some(Duration::from_nanos(
                deadline_ns.saturating_sub(sys::now_ns()),
            )),
        }
    }

    fn set_state(&self, change: impl Fn(State) -> State) {
        let state = self.control.state();
        // The closure never returns `None`, so neither can this fail.
        let _ = state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |word| {
            Some(change(State(word)).0)
        });
    }

    pub(crate) fn open_egress(&self) {
        self.set_state(|state| state.next(state.mode(Direction::Ingress), Mode::Open));
    }

    pub(crate) fn hold_bare(&self) {
        self.set_state(|state| state.next(state.mode(Direction::Ingress), Mode::HoldBare));
    }

    pub(crate) fn open_ingress(&self) {
        self.set_state(|state| state.next(Mode::Open, state.mode(Direction::Egress)));
    }

    pub(crate) fn open_all(&self) {
        self.set_state(|state| state.next(Mode::Open, Mode::Open));
    }

    pub(crate) fn close_ingress(&self, how: Mode) -> Result<(), GateError> {
        self.shut(|state| state.next(how, state.mode(Direction::Egress)))
    }

    pub(crate) fn close(&self, how: Mode) -> Result<(), GateError> {
        self.shut(|state| state.next(how, how))
    }

    pub(crate) fn mute(&self) -> Result<(), GateError> {
        self.shut(|state| state.next(Mode::Open, Mode::Mute))
    }

    /// Drops what was held until now: nobody reads it any more.
    pub(crate) fn drop_instead_of_hold(&self) {
        let without = |mode| match mode {
            Mode::Hold => Mode::Drop,
            // A new connection that nobody answers would wait a second.
            Mode::HoldNew | Mode::HoldBare => Mode::Open,
            other => other,
        };
        self.set_state(|state| {
            let ingress = without(state.mode(Direction::Ingress));
            let egress = without(state.mode(Direction::Egress));
            state.next(ingress, egress)
        });
    }

    /// Closes, unless the lease is over: nobody may take an open gate for a
    /// closed one.
    fn shut(&self, change: impl Fn(State) -> State) -> Result<(), GateError> {
        self.set_state(change);
        let deadline_ns = self.control.deadline_ns().load(Ordering::SeqCst);
        let now_ns = sys::now_ns();
        if expired(deadline_ns, now_ns) {
            self.open_all();
            return Err(lease_expired(deadline_ns, now_ns));
        }
        Ok(())
    }

    pub(crate) fn lease(&self, ttl: Option<Duration>) -> Result<(), GateError> {
        let new_ns = ttl.map_or(0, |ttl| {
            let ttl_ns = u64::try_from(ttl.as_nanos()).unwrap_or(u64::MAX);
            // 0 would mean no lease at all.
            sys::now_ns().saturating_add(ttl_ns).max(1)
        });
        let deadline = self.control.deadline_ns();
        let old_ns = deadline.swap(new_ns, Ordering::SeqCst);
        // Read after the swap: if the old end is still ahead now, no program
        // can have seen it pass.
        let now_ns = sys::now_ns();
        if expired(old_ns, now_ns) && !self.state().is_open() {
            deadline.store(old_ns, Ordering::SeqCst);
            return Err(lease_expired(old_ns, now_ns));
        }
        Ok(())
    }
}

fn lease_expired(deadline_ns: u64, now_ns: u64) -> GateError {
    GateError::LeaseExpired {
        ago: Duration::from_nanos(now_ns.saturating_sub(deadline_ns)),
    }
}

/// The table of flows; what the programs may add is no part of its capacity.
fn flow_table(map: Map) -> Result<FlowTable, GateError> {
    let entries = data(&map)
        .info()
        .map_err(|error| GateError::Load(error.into()))?
        .max_entries();
    Ok(FlowTable::new(map, entries.saturating_sub(NEWCOMERS_MAX)))
}

pub(crate) fn data(map: &Map) -> &MapData {
    match map {
        Map::Array(data) | Map::PerCpuArray(data) | Map::HashMap(data) => data,
        // Every other kind has been refused by name or by the loader: the
        // object has these three only.
        other => unreachable!("the gate has no map like {other:?}"),
    }
}

fn descriptor(map: &Map) -> BorrowedFd<'_> {
    data(map).fd().as_fd()
}

pub(crate) fn address_key(address: IpAddr) -> [u8; 16] {
    match address.to_canonical() {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

pub(crate) fn flow_key(flow: &Flow) -> FlowKey {
    FlowKey {
        local: address_key(flow.local.ip()),
        remote: address_key(flow.remote.ip()),
        local_port_be: flow.local.port().to_be_bytes(),
        remote_port_be: flow.remote.port().to_be_bytes(),
    }
}

/// One key, or two for a wildcard that takes both families.
pub(crate) fn listener_keys(listener: &Listener) -> impl Iterator<Item = ListenerKey> + use<> {
    let port_be = listener.local.port().to_be_bytes();
    let (first, second) = match listener.local {
        SocketAddr::V6(local) if local.ip().is_unspecified() => {
            (ANY_V6, (!listener.v6only).then_some(ANY_V4))
        }
        SocketAddr::V4(_) | SocketAddr::V6(_) => (address_key(listener.local.ip()), None),
    };
    std::iter::once(first)
        .chain(second)
        .map(move |local| ListenerKey::new(local, port_be))
}
