//! Holding: a closed gate's packets wait in user space and come back in order.
//!
//! ```text
//!                       gate programs                        HeldPackets
//!   eth0 receives ----> gate_ingress --redirect--> TAP "i" --> store --+
//!        ^                  |  ^ own mark: pass                        |
//!        |                  v  |                                       v  (the owner's:
//!        |               the stack                                     |   here or on
//!        +---- gate_return, marked <---- TAP "i" <-- inject_ingress ---+   another host)
//!
//!   the stack sends --> gate_egress ---redirect--> TAP "o" --> store --> ...
//!   eth0 sends <------- gate_egress <-- gate_return <-- TAP "o" <-- emit_egress
//! ```
//!
//! Each Ethernet interface has two TAP devices, one per direction, so where a
//! frame was taken is known by where it is read, and a frame needs no marker of
//! its own. They are made in the network namespace of the interfaces, bound to
//! nothing, and vanish with the process: what is then still redirected to them
//! the kernel drops, so a gate without its owner drops until its lease ends.
//!
//! A thread moves frames from the TAP devices into a bounded store. It is no
//! task of the caller's runtime, so that frames are taken also while that is
//! busy with the freeze.
//!
//! A VLAN tag that the interface has taken out stands in the held frame again,
//! and is taken out again when the frame comes back.

pub(crate) mod frame;
mod repeat;
mod store;
mod tap;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::HashMap as RouteMap;
use aya::programs::tc::SchedClassifierLink;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use bytes::Bytes;
use migrate_core::Flow;
use migrate_ebpf_common::parse::is_opening;
use migrate_ebpf_common::{Direction, FlowKey, Route, Segment};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::Notify;

use self::frame::FRAME_BYTES_MAX;
pub use self::repeat::Repeats;
use self::store::Store;
use self::tap::Tap;
use crate::flows::flow;
use crate::sys::DeviceKind;
use crate::{Device, GateError};

/// Beginnings of connections that are remembered. More do not wait in a blackout.
const OPENED_MAX: usize = 1 << 16;

/// An end that was held and one that was sent again meanwhile get one answer
/// between them: to a second its peer, which has done with the connection by
/// then, would say RST. Longer than a packet takes from one host to the other
/// on a machine in distress, shorter than a peer without an answer goes on
/// asking.
const ANSWER_PAUSE: Duration = Duration::from_secs(2);

/// Bounds of what is held in user space. Beside the frames' own bytes, 128 are
/// counted for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldOptions {
    /// For all flows together.
    pub total_bytes_max: usize,
    /// For one flow: what its peer may send at most into the advertised
    /// window, and sends again meanwhile.
    pub flow_bytes_max: usize,
}

impl Default for HoldOptions {
    /// 64 MiB, and 4 MiB for one flow.
    fn default() -> Self {
        Self {
            total_bytes_max: 64 << 20,
            flow_bytes_max: 4 << 20,
        }
    }
}

/// A packet taken out of the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldPacket {
    /// Which way it went.
    pub direction: Direction,
    /// The interface that received it or would have sent it, by index on the
    /// host that holds it.
    pub interface_index: u32,
    /// The frame with its offload header (`struct virtio_net_hdr`, 10 bytes,
    /// little-endian) in front, as the kernel gave it. Up to 64 KiB: packets
    /// merged on receipt or not yet cut for sending stay whole.
    pub frame: Bytes,
}

impl HeldPacket {
    /// Whether it acknowledges and nothing more.
    #[must_use]
    pub fn is_bare(&self) -> bool {
        frame::segment_of(&self.frame, self.direction).is_some_and(|(_, segment)| segment.is_bare())
    }

    /// The connection it belongs to; none for what is no whole TCP segment.
    #[must_use]
    pub fn flow(&self) -> Option<Flow> {
        frame::segment_of(&self.frame, self.direction).map(|(key, _)| flow(&key))
    }
}

/// What is held, and what found no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldStats {
    /// Frames held and not yet taken.
    pub waiting_frames: usize,
    /// Their bytes, offload headers included.
    pub waiting_bytes: usize,
    /// Frames dropped at the bounds of [`HoldOptions`].
    pub dropped_frames: u64,
    /// Their bytes.
    pub dropped_bytes: u64,
}

/// The held packets of one gate, oldest first; the order within a flow and
/// direction is that of the network. Taken once, by
/// [`Gate::held`](crate::Gate::held).
#[derive(Debug)]
pub struct HeldPackets {
    shared: Arc<Shared>,
}

impl HeldPackets {
    /// The next held packet, as soon as there is one; `None` when the gate is
    /// gone and everything has been taken. Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<HeldPacket> {
        loop {
            {
                let mut store = self.shared.store();
                if let Some(packet) = store.pop() {
                    return Some(packet);
                }
                if store.has_ended() {
                    return None;
                }
            }
            // Keeps one wake-up that comes between the look and the wait.
            self.shared.arrived.notified().await;
        }
    }

    /// Everything that is held at this moment, also what the kernel has not
    /// handed over yet.
    ///
    /// Another CPU may be about to hold a packet while a direction opens, so
    /// the last packets come a moment after: go on with [`next`](Self::next)
    /// until the gate is detached.
    pub fn try_drain(&mut self) -> Vec<HeldPacket> {
        self.shared.read_taps();
        let mut store = self.shared.store();
        std::iter::from_fn(|| store.pop()).collect()
    }

    /// What waits, and what found no room.
    #[must_use]
    pub fn stats(&self) -> HeldStats {
        self.shared.store().stats()
    }
}

#[derive(Debug)]
struct Shared {
    reader: Mutex<Reader>,
    store: Mutex<Store>,
    arrived: Notify,
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reader(&self) -> MutexGuard<'_, Reader> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves what the kernel has into the store. One at a time, so that a
    /// flow's order is kept.
    fn read_taps(&self) {
        let mut reader = self.reader();
        let Reader { ports, buffer } = &mut *reader;
        for port in ports.iter() {
            port.read_into(&self.store, buffer);
        }
        // Where nothing has come a wake-up does no harm.
        self.arrived.notify_one();
    }
}

#[derive(Debug)]
struct Reader {
    ports: Vec<Arc<Port>>,
    buffer: Box<[u8]>,
}

/// One TAP device and what it stands for.
#[derive(Debug)]
struct Port {
    tap: Tap,
    direction: Direction,
    interface_index: u32,
    hardware_address: [u8; 6],
    /// Somebody has removed the device.
    is_gone: AtomicBool,
}

/// Frames read from one device before the next has its turn: more than its
/// ring takes.
const BURST_FRAMES: usize = 8192;

impl Port {
    fn read_into(&self, store: &Mutex<Store>, buffer: &mut [u8]) {
        for _ in 0..BURST_FRAMES {
            let frame = match self.tap.read(buffer) {
                Ok(Some(bytes)) => &buffer[..bytes],
                Ok(None) => return,
                Err(error) => {
                    if !self.is_gone.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%error, device = self.tap.name, "a device that holds packets is gone");
                    }
                    return;
                }
            };
            // Whatever else the device says is not the workload's.
            if let Some((key, segment)) = frame::segment_of(frame, self.direction) {
                store.lock().unwrap_or_else(PoisonError::into_inner).push(
                    key,
                    is_opening(segment.flags),
                    self.direction,
                    self.interface_index,
                    frame,
                );
            }
        }
    }
}

/// Everything that holding needs, on the gate's side.
#[derive(Debug)]
pub(crate) struct Hold {
    ports: Vec<Arc<Port>>,
    shared: Arc<Shared>,
    is_taken: AtomicBool,
    /// Frames written to the devices so far.
    written: AtomicU64,
    /// When the peers of flows were heard to end them last; only of those that
    /// the gate's map of closed flows takes.
    ends: Mutex<HashMap<FlowKey, Instant>>,
    /// The beginnings of connections that the kernel was given, by flow and
    /// sequence number.
    opened: Mutex<HashSet<(FlowKey, u32)>>,
    /// `/proc/net/dev` of the devices' namespace.
    device_counters: Mutex<File>,
    /// Its end ends the thread.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    _links: Vec<SchedClassifierLink>,
}

impl Hold {
    /// Makes the devices and starts to read them. `name` is the beginning of
    /// their names.
    pub(crate) fn set_up(
        ebpf: &mut Ebpf,
        devices: &[Device],
        options: HoldOptions,
        name: &str,
    ) -> Result<Self, HoldError> {
        let mut ports = Vec::new();
        for (position, device) in devices.iter().enumerate() {
            if device.kind != DeviceKind::Ethernet {
                continue;
            }
            for (direction, letter) in [(Direction::Ingress, 'i'), (Direction::Egress, 'o')] {
                let name = format!("{name}{letter}{position}");
                let tap = Tap::create(&name).map_err(|error| {
                    HoldError::at(&format!("make the TAP device {name}"), error)
                })?;
                ports.push(Arc::new(Port {
                    tap,
                    direction,
                    interface_index: device.index,
                    hardware_address: device.hardware_address,
                    is_gone: AtomicBool::new(false),
                }));
            }
        }
        if ports.is_empty() {
            return Err(HoldError("no interface has an Ethernet header".to_owned()));
        }
        write_routes(ebpf, &ports)?;
        let links = attach_return(ebpf, &ports)?;
        for port in &ports {
            port.tap.raise().map_err(|error| {
                HoldError::at(&format!("bring up the TAP device {}", port.tap.name), error)
            })?;
        }
        Self::start(ports, options, links)
    }

    fn start(
        ports: Vec<Arc<Port>>,
        options: HoldOptions,
        links: Vec<SchedClassifierLink>,
    ) -> Result<Self, HoldError> {
        let device_counters = File::open("/proc/thread-self/net/dev")
            .map_err(|error| HoldError::at("open /proc/net/dev", error))?;
        let shared = Arc::new(Shared {
            reader: Mutex::new(Reader {
                ports: ports.clone(),
                buffer: vec![0; FRAME_BYTES_MAX].into(),
            }),
            store: Mutex::new(Store::new(options)),
            arrived: Notify::new(),
        });
        let (stop, stopped) =
            UnixStream::pair().map_err(|error| HoldError::at("make a socket pair", error))?;
        let thread = std::thread::Builder::new()
            .name("gate-hold".to_owned())
            .spawn({
                let (shared, ports) = (Arc::clone(&shared), ports.clone());
                move || read_until_stopped(&shared, &ports, &stopped)
            })
            .map_err(|error| HoldError::at("start a thread", error))?;
        Ok(Self {
            ports,
            shared,
            is_taken: AtomicBool::new(false),
            written: AtomicU64::new(0),
            ends: Mutex::default(),
            opened: Mutex::default(),
            device_counters: Mutex::new(device_counters),
            stop: Some(stop),
            thread: Some(thread),
            _links: links,
        })
    }

    pub(crate) fn take(&self) -> Result<HeldPackets, GateError> {
        if self.is_taken.swap(true, Ordering::AcqRel) {
            return Err(GateError::HeldTaken);
        }
        Ok(HeldPackets {
            shared: Arc::clone(&self.shared),
        })
    }

    /// Gives a frame to an interface, as received by it or to be sent by it.
    /// `knows` tells whether a flow is the workload's.
    pub(crate) fn give_back(
        &self,
        direction: Direction,
        interface_index: u32,
        frame: &[u8],
        knows: impl FnOnce(&FlowKey) -> Result<bool, GateError>,
    ) -> Result<(), GateError> {
        let port = self
            .ports
            .iter()
            .find(|port| port.interface_index == interface_index && port.direction == direction)
            .ok_or(GateError::NotHeld {
                index: interface_index,
            })?;
        let key = frame::check(frame, direction).map_err(GateError::BadFrame)?;
        if !knows(&key)? {
            return Err(GateError::ForeignFrame);
        }
        match direction {
            Direction::Ingress => {
                let mut addressed = frame.to_vec();
                frame::set_destination(&mut addressed, port.hardware_address);
                self.write(port, &addressed)
            }
            Direction::Egress => self.write(port, frame),
        }
    }

    fn write(&self, port: &Port, frame: &[u8]) -> Result<(), GateError> {
        port.tap
            .write(frame)
            .map_err(|source| GateError::GiveBack {
                index: port.interface_index,
                source,
            })?;
        self.written.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Frames given to the kernel so far, which are to pass the gate again.
    pub(crate) fn written_frames(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Whether the kernel was given this beginning of a connection before: one
    /// that its peer has sent twice and that was held twice. The second would
    /// begin another connection if the first has ended meanwhile.
    pub(crate) fn was_opened(&self, key: FlowKey, segment: Segment) -> bool {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.len() < OPENED_MAX && !opened.insert((key, segment.sequence))
    }

    /// Acknowledges the end of a connection in a frame that `interface_index`
    /// has received, where there is one, instead of giving the frame to the
    /// kernel. A reset is an end as well, which asks for no answer.
    pub(crate) fn answer(&self, interface_index: u32, frame: &[u8]) -> Result<(), GateError> {
        let port = self
            .ports
            .iter()
            .find(|port| {
                port.interface_index == interface_index && port.direction == Direction::Egress
            })
            .ok_or(GateError::NotHeld {
                index: interface_index,
            })?;
        let key = frame::check(frame, Direction::Ingress).map_err(GateError::BadFrame)?;
        match frame::acknowledge_end(frame, port.hardware_address) {
            Some(_) if self.has_just_answered(key) => Ok(()),
            Some(answer) => self.write(port, &answer),
            None => {
                if frame::is_reset(frame) {
                    self.ends().insert(key, Instant::now());
                }
                Ok(())
            }
        }
    }

    /// Whether this flow's end has been acknowledged a moment ago; if not, it
    /// has been now.
    fn has_just_answered(&self, key: FlowKey) -> bool {
        let now = Instant::now();
        match self.ends().entry(key) {
            Entry::Occupied(at) if now - *at.get() < ANSWER_PAUSE => true,
            entry => {
                entry.insert_entry(now);
                false
            }
        }
    }

    /// When the peer of a flow was heard to end it last.
    pub(crate) fn end_heard_at(&self, key: &FlowKey) -> Option<Instant> {
        self.ends().get(key).copied()
    }

    /// Forgets that it was.
    pub(crate) fn forget_end(&self, key: &FlowKey) {
        self.ends().remove(key);
    }

    fn ends(&self) -> MutexGuard<'_, HashMap<FlowKey, Instant>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the kernel's rings fill for as long as the value lives.
    #[cfg(test)]
    pub(crate) fn stop_reading(&self) -> impl Drop + '_ {
        self.shared.reader()
    }

    /// Frames of each flow for which there was no room here.
    pub(crate) fn flow_dropped(&self) -> HashMap<FlowKey, u32> {
        self.shared.store().flow_dropped().clone()
    }

    /// Frames for which there was no room, in the kernel or here.
    pub(crate) fn dropped_frames(&self) -> Result<u64, GateError> {
        let mut text = String::new();
        let mut file = self
            .device_counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        file.rewind()
            .and_then(|()| file.read_to_string(&mut text))
            .map_err(|source| GateError::Map {
                attempt: "read",
                table: "TAP devices' counters",
                source,
            })?;
        let names: HashSet<&str> = self
            .ports
            .iter()
            .map(|port| port.tap.name.as_str())
            .collect();
        let in_kernel: u64 = text
            .lines()
            .filter_map(transmit_drops)
            .filter_map(|(name, drops)| names.contains(name).then_some(drops))
            .sum();
        Ok(in_kernel + self.shared.store().stats().dropped_frames)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say, and a panic in it has been reported.
            let _ = thread.join();
        }
        // What has come to the end is kept for the one who takes it; then the
        // devices go, even while somebody still has the packets.
        self.shared.read_taps();
        self.shared.reader().ports.clear();
        self.shared.store().end();
        self.shared.arrived.notify_one();
    }
}

/// Why there is no holding, for a person to read.
#[derive(Debug)]
pub(crate) struct HoldError(pub(crate) String);

impl HoldError {
    fn at(attempt: &str, error: impl std::fmt::Display) -> Self {
        Self(format!("could not {attempt}: {error}"))
    }
}

fn write_routes(ebpf: &mut Ebpf, ports: &[Arc<Port>]) -> Result<(), HoldError> {
    let failed = |error: aya::maps::MapError| HoldError::at("write the gate's routes", error);
    let map = ebpf
        .map_mut("ROUTES")
        .ok_or_else(|| HoldError("the object has no map ROUTES".to_owned()))?;
    let mut routes = RouteMap::<_, u32, Route>::try_from(map).map_err(failed)?;
    for port in ports {
        let (there, back) = (port.interface_index, port.tap.index);
        let mut of_interface = routes.get(&there, 0).unwrap_or_default();
        let of_tap = match port.direction {
            Direction::Ingress => {
                of_interface.ingress = back;
                Route {
                    ingress: there,
                    egress: 0,
                }
            }
            Direction::Egress => {
                of_interface.egress = back;
                Route {
                    ingress: 0,
                    egress: there,
                }
            }
        };
        routes.insert(there, of_interface, 0).map_err(failed)?;
        routes.insert(back, of_tap, 0).map_err(failed)?;
    }
    Ok(())
}

/// Puts the way back on the devices. Not pinned: it goes with them.
fn attach_return(
    ebpf: &mut Ebpf,
    ports: &[Arc<Port>],
) -> Result<Vec<SchedClassifierLink>, HoldError> {
    let program: &mut SchedClassifier = ebpf
        .program_mut("gate_return")
        .ok_or_else(|| HoldError("the object has no program gate_return".to_owned()))?
        .try_into()
        .map_err(|error| HoldError::at("use the program gate_return", error))?;
    crate::load(program).map_err(|error| HoldError::at("load the program gate_return", error))?;
    ports
        .iter()
        .map(|port| {
            if !crate::has_tcx() {
                return crate::attach_filter(program, &port.tap.name, TcAttachType::Ingress);
            }
            let id = program.attach_with_options(
                &port.tap.name,
                TcAttachType::Ingress,
                TcAttachOptions::TcxOrder(LinkOrder::first()),
            )?;
            program.take_link(id)
        })
        .collect::<Result<_, _>>()
        .map_err(|error| HoldError::at("attach to a TAP device", error))
}

/// The thread: waits for frames until the other end of `stopped` closes.
fn read_until_stopped(shared: &Shared, ports: &[Arc<Port>], stopped: &UnixStream) {
    loop {
        let live = ports
            .iter()
            .filter(|port| !port.is_gone.load(Ordering::Relaxed));
        let mut waiting = vec![PollFd::new(stopped.as_fd(), PollFlags::empty())];
        waiting.extend(live.map(|port| PollFd::new(port.tap.as_fd(), PollFlags::POLLIN)));
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => {
                tracing::error!(%errno, "could not wait for held packets");
                return;
            }
        }
        let is_stopped = waiting[0]
            .revents()
            .is_some_and(|events| !events.is_empty());
        if is_stopped {
            return;
        }
        shared.read_taps();
    }
}

/// Name and frames dropped on transmission (for a TAP: into the ring) of one
/// line of `/proc/net/dev`.
fn transmit_drops(line: &str) -> Option<(&str, u64)> {
    let (name, numbers) = line.split_once(':')?;
    let drops = numbers.split_ascii_whitespace().nth(11)?.parse().ok()?;
    Some((name.trim(), drops))
}

/// The beginning of the names of a gate's devices: short, and another for
/// every gate (FNV-1a over its name).
pub(crate) fn device_prefix(gate: &str) -> String {
    let hash = gate.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("mg{hash:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_read_from_the_right_column() {
        let line = "  mgi0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16";
        assert_eq!(transmit_drops(line), Some(("mgi0", 12)));
        assert_eq!(transmit_drops("Inter-|   Receive  | Transmit"), None);
    }

    #[test]
    fn device_names_fit() {
        let prefix = device_prefix(&"a".repeat(64));
        assert!(format!("{prefix}o9999").len() <= 15);
        assert_ne!(prefix, device_prefix("b"));
    }
}
