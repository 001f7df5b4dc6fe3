//! Prepare: the gate is closed before the address exists here, so that no
//! packet can be answered too early.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use migrate_core::facts::{AddressFacts, StdioFacts};
use migrate_core::journal::{RECORD_VERSION, Record, Side, Stage};
use migrate_core::wire::{Message, NetworkLock, RestoreChoice, StdioChoice};
use migrate_criu::stdio::placeholder_key;
use migrate_criu::{ImageDir, RestoreOptions, Worker, WorkerOptions};
use migrate_gate::{Gate, GateOptions, Role};
use migrate_proc::Home;

use super::{Destination, Engine, Incoming, Order, SILENCE};
use crate::error::Error;
use crate::guard::Guard;
use crate::images::ImagePlace;

/// journald's socket for services' standard output (systemd
/// `src/journal/journald-stream.c`).
pub(super) const JOURNAL_SOCKET: &str = "/run/systemd/journal/stdout";

/// Room for connections that come before the tree stands still.
const SPARE_FLOWS: usize = 4096;

impl Destination {
    /// Makes this host ready for the tree, which comes over so many connections.
    pub(super) async fn prepare(
        &mut self,
        connections: u32,
        restore: RestoreChoice,
        lock: NetworkLock,
        postcopy: bool,
    ) -> Result<(), Error> {
        // From here on this process has something to undo, so it must not go
        // down with the login that started it.
        migrate_proc::detach_from_session()?;
        let order = self.order.as_ref().ok_or_else(no_order)?;

        let images = self.state.image_root()?.join(&self.migration_id);
        let record = self.record(order, &images.display().to_string());
        self.journal = Some(super::claims::begin(&self.state, record, &order.tree)?);
        self.guard = Guard::start(&self.migration_id, Side::Destination);

        let addresses = self.addresses();
        let interfaces: Vec<u32> = order
            .placements
            .iter()
            .map(|placement| placement.ifindex)
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect();
        if !interfaces.is_empty() {
            let gate = self.gate.insert(Gate::attach(
                &interfaces,
                &GateOptions {
                    id: self.migration_id.clone(),
                    role: Role::Destination,
                    flow_capacity: u32::try_from(order.tree.flows.len() * 2 + SPARE_FLOWS)
                        .unwrap_or(u32::MAX),
                    directory: self.state.gates(),
                    hold: (lock == NetworkLock::Gate)
                        .then(|| crate::held::bounds(order.tree.windows)),
                    is_extensible: false,
                },
            )?);
            gate.add_flows(&order.tree.flows)?;
            gate.add_listeners(&order.tree.listeners)?;
            gate.stage_addresses(&addresses)?;
            gate.close()?;
            gate.start_watching();
            self.held = gate.held().ok();
            if let Some(reason) = gate.drop_reason() {
                tracing::warn!(reason, "packets are dropped, not held");
            }
        }
        let flows = order.tree.flows.clone();
        self.track_untracked(&flows);
        let order = self.order.as_ref().ok_or_else(no_order)?;
        let net = self.net.as_ref().ok_or_else(no_order)?;
        // A packet that cannot be sent for want of a neighbour's hardware
        // address waits a second for the next question. Asked now, with an
        // address of this host's own, nobody waits after the takeover.
        let peers: std::collections::BTreeSet<IpAddr> = order
            .tree
            .flows
            .iter()
            .map(|flow| flow.remote.ip())
            .collect();
        net.find_neighbours(&peers, &interfaces).await;
        if self.parked.is_none() {
            for placement in &order.placements {
                self.staged.push(net.stage(placement).await?);
            }
        }

        let place = self.place.insert(ImagePlace::make(images)?);
        let images = self.images.insert(ImageDir::create(place.images())?);
        let home = self
            .home
            .insert(Home::create(&order.tree, &self.migration_id)?);
        let path = home.path();
        if let Some(journal) = &mut self.journal {
            journal.update(|record| record.home = Some(path))?;
        }
        self.lazy.prepare(
            restore,
            &self.state,
            &self.migration_id,
            &order.tree,
            home,
            images,
        )?;
        let (worker, options) = self.worker(self.lazy.is_prepared()).await?;
        let images = self.images.as_mut().ok_or_else(no_order)?;
        let parked = worker.park(options, images).await?;
        self.engine = Engine::Parked(parked);
        self.join_streams(connections, postcopy).await
    }

    /// Starts CRIU for this tree, with what its order will be.
    pub(super) async fn worker(&mut self, lazy: bool) -> Result<(Worker, RestoreOptions), Error> {
        let order = self.order.as_ref().ok_or_else(no_order)?;
        let criu = self.criu.as_ref().ok_or_else(no_order)?;
        let home = self.home.as_ref().ok_or_else(no_order)?;
        let images = self.images.as_ref().ok_or_else(no_order)?;
        let name = order.tree.processes.first().map_or("", |root| &root.name);
        let (mut streams, mut inherit) = reattach(&order.tree.stdio, &order.stdio, name)?;
        if let Some(tunnel) = &order.tree.tunnel {
            let failed = Error::file("attach to tunnel device", &tunnel.name);
            let attached = match &self.tunnel {
                Some(end) => end.try_clone(),
                None => migrate_proc::attach_tunnel(tunnel)
                    .and_then(|end| self.tunnel.insert(end).try_clone()),
            };
            inherit.push(attached.map_err(failed)?);
            streams.push(migrate_proc::TUNNEL_DEVICE.to_owned());
        }
        let worker = criu
            .worker(WorkerOptions {
                cgroup: home.directory().map(ToOwned::to_owned),
                inherit,
                new_session: true,
                small_pages: lazy,
                ..WorkerOptions::default()
            })
            .await?;
        // Each file that led out of the tree becomes what was opened for it.
        let inherit_fd = streams
            .iter()
            .enumerate()
            .map(|(index, resource)| (placeholder_key(resource), worker.inherited(index)))
            .collect();
        let options = RestoreOptions {
            shell_job: order.tree.shell_job,
            inherit_fd,
            external_unix: true,
            lazy,
            ..RestoreOptions::new(images.path())
        };
        self.streams = streams;
        Ok((worker, options))
    }

    /// How long connections that have joined may take to be handed over here.
    const JOIN_LIMIT: Duration = Duration::from_secs(5);

    /// Says that all is ready and takes the further connections.
    async fn join_streams(&mut self, connections: u32, postcopy: bool) -> Result<(), Error> {
        const AWAITED: &str = "the page stream";
        let peer = self.peer.clone();
        let broken = |source| Error::Channel {
            peer: peer.clone(),
            source,
        };
        let further = self.further.take().ok_or_else(no_order)?;
        let expected = further
            .expect(connections.saturating_sub(1) + u32::from(postcopy))
            .map_err(broken)?;
        self.send(&Message::Prepared).await?;
        match self.message(AWAITED, SILENCE).await? {
            Message::Streams => {}
            Message::Abort { reason } => return Err(Error::Aborted(reason)),
            other => return Err(self.unexpected(&other, AWAITED)),
        }
        let mut lanes = expected.all(Self::JOIN_LIMIT).await.map_err(broken)?;
        // The last one is no part of the page stream.
        if postcopy && let Some(lane) = lanes.pop() {
            self.lazy.comes_over(lane.into_ends(&peer));
        }
        match &mut self.incoming {
            Incoming::Frames(receiver) => receiver.stripe(lanes).map_err(broken),
            Incoming::Messages(_) | Incoming::Closed => Err(no_order()),
        }
    }

    fn record(&self, order: &Order, images: &str) -> Record {
        let owner_pid = std::process::id().cast_signed();
        Record {
            version: RECORD_VERSION,
            migration_id: self.migration_id.clone(),
            side: Side::Destination,
            stage: Stage::Preparing,
            owner_pid,
            owner_start_ticks: migrate_proc::start_ticks(owner_pid).unwrap_or(0),
            root_pid: order.tree.root_pid,
            pids: order.tree.processes.iter().map(|p| p.pid).collect(),
            name: order
                .tree
                .processes
                .first()
                .map_or_else(String::new, |process| process.name.clone()),
            peer: self.peer.clone(),
            // What is here already stays, whatever happens.
            addresses: order
                .placements
                .iter()
                .filter(|_| self.parked.is_none())
                .map(|placement| AddressFacts {
                    ip: placement.ip,
                    prefix_len: placement.prefix_len,
                    interface: placement.interface.clone(),
                })
                .collect(),
            images: Some(images.to_owned()),
            fence: None,
            hold_down: None,
            route: None,
            withdrawn: None,
            network_lock: NetworkLock::Gate,
            home: None,
            claims: super::claims::of(&order.tree),
        }
    }
}

fn no_order() -> Error {
    Error::Changed("the source asked to prepare a tree that preflight has not accepted".to_owned())
}

/// Opens what the tree's outside streams lead to from now on: CRIU's keys and
/// the fds, in the same order.
fn reattach(
    stdio: &[StdioFacts],
    choice: &StdioChoice,
    name: &str,
) -> Result<(Vec<String>, Vec<OwnedFd>), Error> {
    let mut keys = Vec::new();
    let mut fds = Vec::new();
    for stream in stdio {
        let fd: OwnedFd = match choice {
            StdioChoice::Keep => continue,
            // What is only read from must not read what the tree writes.
            _ if !stream.writable => File::open("/dev/null")
                .map_err(Error::file("open", "/dev/null"))?
                .into(),
            StdioChoice::Null => OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/null")
                .map_err(Error::file("open", "/dev/null"))?
                .into(),
            StdioChoice::File(path) => OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .map_err(Error::file("open", path))?
                .into(),
            StdioChoice::Journal => journal_stream(name)
                .map_err(Error::file("open", JOURNAL_SOCKET))?
                .into(),
        };
        keys.push(stream.resource.clone());
        fds.push(fd);
    }
    Ok((keys, fds))
}

/// A stream into the journal. Its header is seven lines: identifier, unit,
/// priority, level prefix, forward to syslog, to kmsg, to console. No unit is
/// stated: journald goes by the cgroup of whoever writes, and takes the statement
/// for those alone that are in none.
fn journal_stream(name: &str) -> std::io::Result<UnixStream> {
    // A process may call itself by a line's end.
    let name = name.replace(char::is_control, "_");
    let mut stream = UnixStream::connect(JOURNAL_SOCKET)?;
    stream.write_all(format!("{name}\n\n6\n1\n0\n0\n0\n").as_bytes())?;
    Ok(stream)
}
