//! The table of flows, and what the gate remembers of them.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{Map, MapData};
use migrate_core::Flow;
use migrate_ebpf_common::{FlowKey, FlowRecord, Way};

use crate::GateError;
use crate::sys;
use crate::tables::{data, flow_key};

const TABLE: &str = "flows";

/// Fewer than these are put in one by one, which leaves a record alone that
/// the programs have made meanwhile; one call of many replaces it.
const ONE_BY_ONE_MAX: usize = 64;

/// What the gate remembers of one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowActivity {
    /// The flow.
    pub flow: Flow,
    /// From the peer.
    pub ingress: Way,
    /// To the peer.
    pub egress: Way,
    /// Frames among those kept back that were dropped, because there was no
    /// room for them or no means to hold them. Merged packets count once.
    pub dropped: u32,
}

/// The flows at the end of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCount {
    /// Flows that the gate knows.
    pub flows: usize,
    /// Those of them that had traffic since the round began.
    pub dirty: usize,
}

/// The map of flows. The programs look into it and add to it; this side names
/// the tree's own, and takes away what has ended.
#[derive(Debug)]
pub(crate) struct FlowTable {
    map: Map,
    /// Without what the programs may put in by themselves.
    capacity: u32,
    /// What this process has put in.
    named: Mutex<HashSet<FlowKey>>,
}

impl FlowTable {
    pub(crate) fn new(map: Map, capacity: u32) -> Self {
        Self {
            map,
            capacity,
            named: Mutex::default(),
        }
    }

    pub(crate) fn map(&self) -> &Map {
        &self.map
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        let data: &MapData = data(&self.map);
        data.fd().as_fd()
    }

    fn named(&self) -> MutexGuard<'_, HashSet<FlowKey>> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts flows in; those that are in keep what is remembered of them.
    pub(crate) fn add(&self, flows: &[Flow]) -> Result<(), GateError> {
        let mut named = self.named();
        let missing: Vec<FlowKey> = flows
            .iter()
            .map(flow_key)
            .filter(|key| !named.contains(key))
            .collect();
        if named.len() + missing.len() > usize::try_from(self.capacity).unwrap_or(usize::MAX) {
            return Err(self.full(missing.len()));
        }
        let record = FlowRecord::default();
        let added = if missing.len() > ONE_BY_ONE_MAX {
            sys::insert_keys(self.descriptor(), &missing, record)
        } else {
            missing
                .iter()
                .try_for_each(|key| sys::insert_new(self.descriptor(), key, &record))
        };
        added.map_err(|source| match source.raw_os_error() {
            Some(libc::E2BIG) => self.full(missing.len()),
            _ => failed("change", source),
        })?;
        named.extend(missing);
        Ok(())
    }

    /// Takes away what neither is among `flows` nor has had traffic since
    /// `idle_since_ns`. Also tells how many newcomers stay.
    pub(crate) fn retain(&self, flows: &[Flow], idle_since_ns: u64) -> Result<u64, GateError> {
        let alive: HashSet<FlowKey> = flows.iter().map(flow_key).collect();
        let mut named = self.named();
        let mut newcomers = 0;
        for (key, record) in self.records()? {
            let idle = record.ingress.last_ns.max(record.egress.last_ns) < idle_since_ns;
            if idle && !alive.contains(&key) {
                sys::remove_key(self.descriptor(), &key)
                    .map_err(|source| failed("change", source))?;
                named.remove(&key);
            } else {
                newcomers += u64::from(record.is_newcomer != 0);
            }
        }
        Ok(newcomers)
    }

    pub(crate) fn contains(&self, key: &FlowKey) -> Result<bool, GateError> {
        if self.named().contains(key) {
            return Ok(true);
        }
        let mut record = FlowRecord::default();
        sys::look_up(self.descriptor(), key, &mut record).map_err(|source| failed("read", source))
    }

    pub(crate) fn count(&self, round_ns: u64) -> Result<FlowCount, GateError> {
        let records = self.records()?;
        let is_dirty = |record: &FlowRecord| {
            round_ns != 0 && record.ingress.last_ns.max(record.egress.last_ns) >= round_ns
        };
        Ok(FlowCount {
            flows: records.len(),
            dirty: records.iter().filter(|(_, r)| is_dirty(r)).count(),
        })
    }

    /// `dropped` tells how many frames of a flow that were to be held found no
    /// room; without it nothing was held at all.
    pub(crate) fn activity(
        &self,
        dropped: Option<&HashMap<FlowKey, u32>>,
    ) -> Result<Vec<FlowActivity>, GateError> {
        let records = self.records()?;
        Ok(records
            .into_iter()
            .map(|(key, record)| FlowActivity {
                flow: flow(&key),
                ingress: record.ingress,
                egress: record.egress,
                dropped: match dropped {
                    Some(dropped) => dropped.get(&key).copied().unwrap_or(0),
                    None => record.ingress.kept.saturating_add(record.egress.kept),
                },
            })
            .collect())
    }

    fn records(&self) -> Result<Vec<(FlowKey, FlowRecord)>, GateError> {
        let capacity = data(&self.map)
            .info()
            .map_err(|error| failed("read", io::Error::other(error)))?
            .max_entries();
        sys::read_all(self.descriptor(), capacity).map_err(|source| failed("read", source))
    }

    fn full(&self, asked: usize) -> GateError {
        GateError::Full {
            table: TABLE,
            capacity: self.capacity,
            asked,
        }
    }
}

fn failed(attempt: &'static str, source: io::Error) -> GateError {
    GateError::Map {
        attempt,
        table: TABLE,
        source,
    }
}

/// The flow of a key.
pub(crate) fn flow(key: &FlowKey) -> Flow {
    let end = |address: [u8; 16], port_be: [u8; 2]| {
        SocketAddr::new(
            IpAddr::V6(Ipv6Addr::from(address)),
            u16::from_be_bytes(port_be),
        )
    };
    // Mapped addresses become IPv4 there.
    Flow::new(
        end(key.local, key.local_port_be),
        end(key.remote, key.remote_port_be),
    )
}
