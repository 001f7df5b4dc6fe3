//! Preflight: look at the tree, let the destination compare, refuse in time.

use std::net::IpAddr;
use std::time::Duration;

use migrate_channel::{Connection, Destination};
use migrate_core::facts::{HostFacts, SocketFacts, StdioFacts, StdioKind, TreeFacts};
use migrate_core::parked::Keep;
use migrate_core::preflight::{Finding, Severity};
use migrate_core::report::counted;
use migrate_core::wire::{Message, RestoreChoice, StdioChoice};
use migrate_net::{Net, SurveyOptions, TreeSockets};
use migrate_proc::{TcpSockets, Tree};

use super::precopy::{EngineChoice, choose};
use super::{
    CONNECT_LIMIT, Choices, Link, MemoryEngine, Migration, Plan, READY_LIMIT, Target, migration_id,
};
use crate::error::Error;
use crate::inbox::Inbox;
use crate::progress::{Progress, Reporter};
use crate::state::State;

/// What [`check`] has found.
#[derive(Debug)]
pub struct Checked {
    /// One line per check.
    pub findings: Vec<Finding>,
    /// Every TCP socket of the tree.
    pub sockets: Vec<SocketFacts>,
}

/// What an examination of the tree brought to light.
pub(super) struct Examined {
    pub(super) plan: Plan,
    pub(super) findings: Vec<Finding>,
    pub(super) sockets: Vec<SocketFacts>,
}

/// How long memory of an earlier migration may take to be complete. It comes
/// with some GB a second.
const MEMORY_LIMIT: Duration = Duration::from_secs(60);

/// Connections whose patience is told in one message, which may have 4 MiB; one
/// takes 80 bytes at most.
const PATIENCE_AT_ONCE: usize = 16 << 10;

/// Bytes a second that a full dump and restore are expected to move, for the
/// warning about big trees: measured 0.5 to 2.5 GB/s with cold and warm tmpfs.
const EXPECTED_BYTES_PER_SECOND: u64 = 500_000_000;

impl Migration {
    /// Connects, examines, compares.
    pub(super) async fn preflight(&mut self) -> Result<String, Error> {
        crate::sweep::sweep(&self.state).await;
        // What has not come yet would be zeros on the next host.
        let pids = migrate_proc::tree(self.request.pid)?.pids();
        self.state.await_memory(&pids, MEMORY_LIMIT).await?;
        let link = match &self.request.target {
            Target::Host(host) => connect(host, &self.id, &self.reporter).await?,
            Target::Directory(place) => linked(
                crate::park::connect(place, &self.id),
                &self.id,
                &self.reporter,
            ),
            Target::Keeper(keeper) => connect(&keeper.host, &self.id, &self.reporter).await?,
        };
        self.link = Some(link);
        crate::pause::at(self.step.phase().name());
        let net = Net::open().await?;
        let examined = examine(&self.state, &net, self.request.pid, &self.request.choices).await?;
        self.net = Some(net);
        let mut findings = examined.findings;
        let choices = self.request.choices.clone();
        let (tree, host) = (&examined.plan.facts, &examined.plan.host);
        if let Some(place) = self.request.target.place() {
            findings.extend(crate::park::kernel_findings());
            if let Target::Keeper(_) = &self.request.target {
                findings.push(crate::park::judge(place, "takes what the boot goes by"));
            }
            let order = Message::Keep(Box::new(Keep {
                name: place.name().to_owned(),
                machine_id: crate::park::machine_id(),
                boot_id: crate::park::boot_id()?,
            }));
            let pids: Vec<i32> = tree.processes.iter().map(|process| process.pid).collect();
            let timers = TcpSockets::of(&pids).map(|sockets| sockets.patience());
            let timers = timers.unwrap_or_default();
            let timers = timers.chunks(PATIENCE_AT_ONCE);
            let timers = timers.map(|some| Message::Patience(some.to_vec()));
            for message in std::iter::once(order).chain(timers) {
                self.send(&message).await?;
            }
        }
        findings.extend(ask(self.link()?, tree, host, &choices).await?);
        self.reporter.findings(&findings);
        let refused: Vec<String> = findings
            .iter()
            .filter(|finding| finding.severity == Severity::Refused)
            .map(|finding| format!("{}: {}", finding.subject, finding.finding))
            .collect();
        if !refused.is_empty() {
            let reason = "preflight refused the migration".to_owned();
            self.send(&Message::Abort { reason }).await?;
            return Err(Error::Refused(refused));
        }
        let facts = &examined.plan.facts;
        let detail = format!(
            "{}, {}, {}",
            counted(findings.len(), "check"),
            counted(facts.processes.len(), "process"),
            counted(facts.flows.len(), "connection")
        );
        self.plan = Some(examined.plan);
        Ok(detail)
    }
}

/// Preflight and nothing else: examines the tree, and lets the destination
/// compare when one is named.
///
/// # Errors
///
/// The examination itself failed; what it found is in the findings.
pub async fn check(
    pid: i32,
    destination: Option<&Destination>,
    choices: &Choices,
    reporter: &Reporter,
) -> Result<Checked, Error> {
    migrate_proc::validate_target(pid)?;
    let state = State::open()?;
    let net = Net::open().await?;
    let examined = examine(&state, &net, pid, choices).await?;
    let mut findings = examined.findings;
    if let Some(destination) = destination {
        let id = migration_id()?;
        let mut link = connect(destination, &id, reporter).await?;
        findings.extend(
            ask(
                &mut link,
                &examined.plan.facts,
                &examined.plan.host,
                choices,
            )
            .await?,
        );
        let reason = "only a check".to_owned();
        let _ = link.sender.control(&Message::Abort { reason }).await;
        let _ = link.sender.close().await;
        link.inbox.closed(Migration::PEER_UNDO_LIMIT).await;
    }
    Ok(Checked {
        findings,
        sockets: examined.sockets,
    })
}

pub(super) async fn connect(
    destination: &Destination,
    id: &str,
    reporter: &Reporter,
) -> Result<Link, Error> {
    let connection = migrate_channel::connect(destination, crate::hello(id), CONNECT_LIMIT)
        .await
        .map_err(Error::Connect)?;
    Ok(linked(connection, id, reporter))
}

fn linked(connection: Connection, id: &str, reporter: &Reporter) -> Link {
    let peer = connection.hello.hostname.clone();
    reporter.tell(Progress::Connected {
        migration_id: id.to_owned(),
        destination: peer.clone(),
    });
    Link {
        sender: connection.sender,
        inbox: Inbox::new(peer.clone(), connection.receiver),
        peer,
        further: Some(connection.further),
    }
}

/// Lets the destination compare.
async fn ask(
    link: &mut Link,
    tree: &TreeFacts,
    source: &HostFacts,
    choices: &Choices,
) -> Result<Vec<Finding>, Error> {
    const AWAITED: &str = "the destination's findings";
    let question = Message::Preflight {
        tree: Box::new(tree.clone()),
        source: Box::new(source.clone()),
        stdio: choices.stdio.clone(),
        adopt: choices.adopt,
    };
    link.sender
        .control(&question)
        .await
        .map_err(|source| Error::Channel {
            peer: link.peer.clone(),
            source,
        })?;
    match link.inbox.next_within(AWAITED, READY_LIMIT).await? {
        Message::Findings { findings, .. } => Ok(findings),
        other => Err(link.inbox.unexpected(&other, AWAITED)),
    }
}

/// CRIU takes a tunnel device for an open file only under the library that makes
/// every page look dirty to it.
fn without_soft_dirty(choice: EngineChoice) -> Finding {
    let (subject, why) = (
        "memory engine",
        "soft-dirty cannot be used beside a tunnel device",
    );
    match choice {
        EngineChoice::Auto => Finding::note(
            subject,
            format!("{why}: full, the frozen tree is read whole and compared"),
            "",
        ),
        EngineChoice::Only(_) => Finding::refused(subject, why, "use --engine full"),
    }
}

/// Looks at the tree and at this host.
async fn examine(state: &State, net: &Net, pid: i32, choices: &Choices) -> Result<Examined, Error> {
    let tree = migrate_proc::tree(pid)?;
    let sockets = survey(net, choices, &tree).await?;
    let mut findings = tree.findings()?;
    let stdio = tree.stdio()?;
    findings.extend(judge_stdio(&stdio, &choices.stdio));
    let supervisor = migrate_proc::supervisor(&tree)?;
    if let Some(found) = &supervisor
        && !choices.ignore_supervisor
    {
        findings.push(migrate_proc::supervisor_finding(found));
    }
    let (found, criu) = crate::examine_criu("source").await;
    findings.extend(found);
    if let Some(criu) = &criu
        && let Err(error) = crate::criu_lock(choices.lock).check(criu).await
    {
        findings.push(Finding::refused(
            "network lock",
            crate::error::chain(&error),
            error.help().unwrap_or_default(),
        ));
    }
    let mut host = crate::images::host_facts(state)?;
    host.criu = criu.as_ref().map(|criu| criu.version);
    findings.extend(sockets.findings);
    let moving: Vec<IpAddr> = sockets.addresses.iter().map(|a| a.ip).collect();
    findings.extend(super::tracking::findings(&moving));
    let memory = tree.resident_memory()?;
    let facts = TreeFacts {
        root_pid: pid,
        processes: tree.processes.clone(),
        files: tree.files()?,
        flows: sockets.flows,
        listeners: sockets.listeners,
        windows: sockets.windows,
        addresses: sockets.addresses,
        stdio,
        tunnel: tree.tunnel()?,
        resident_bytes: memory.bytes,
        common_bytes: memory.common_bytes,
        shell_job: tree.shell_job(),
        cgroup: tree.cgroup().to_owned(),
        unit: migrate_proc::unit_facts(&tree, supervisor.as_ref()),
    };
    findings.extend(judge_postcopy(choices, facts.processes.len()));
    let engine = match &criu {
        Some(criu) => {
            let (engine, finding) = choose(choices.engine, criu).await;
            findings.push(finding);
            engine
        }
        None => MemoryEngine::Full,
    };
    let engine = if engine == MemoryEngine::SoftDirty && facts.tunnel.is_some() {
        findings.push(without_soft_dirty(choices.engine));
        MemoryEngine::Full
    } else {
        engine
    };
    let still = facts.resident_bytes / EXPECTED_BYTES_PER_SECOND;
    if engine == MemoryEngine::Full && still >= choices.max_blackout.as_secs() {
        findings.push(Finding::note(
            "memory",
            format!(
                "{} MiB are resident: the tree may stand still for more than the {} s allowed",
                facts.resident_bytes >> 20,
                choices.max_blackout.as_secs()
            ),
            "allow more with --max-blackout SECONDS",
        ));
    }
    Ok(Examined {
        plan: Plan {
            tree,
            facts,
            host,
            interfaces: sockets.interfaces,
            criu,
            engine,
            supervisor,
        },
        findings,
        sockets: sockets.sockets,
    })
}

/// What it means that memory may go over after the commit.
fn judge_postcopy(choices: &Choices, processes: usize) -> Option<Finding> {
    let subject = "postcopy";
    if !choices.may_postcopy() {
        return None;
    }
    if choices.restore == RestoreChoice::Eager {
        return Some(Finding::refused(
            subject,
            "an eager restore needs all memory before the copy runs",
            "leave out --restore eager, or postcopy",
        ));
    }
    if processes > 1 && choices.restore != RestoreChoice::Lazy {
        return Some(Finding::refused(
            subject,
            format!(
                "memory that comes late gives each of the {processes} processes pages of its own, also where they have some in common"
            ),
            "leave postcopy out, or accept that with --restore lazy",
        ));
    }
    Some(Finding::note(
        subject,
        "from the handover until all memory has arrived the tree needs both hosts: if this one or the network between them fails in that time, the tree is lost",
        "",
    ))
}

/// A stream that leads out of the tree cannot be carried as it is.
fn judge_stdio(stdio: &[StdioFacts], choice: &StdioChoice) -> Vec<Finding> {
    stdio
        .iter()
        // The destination knows whether it has the file.
        .filter(|stream| stream.kind != StdioKind::File)
        .map(|stream| {
            let what = match stream.kind {
                StdioKind::File => "a file",
                StdioKind::Terminal => "a terminal",
                StdioKind::Pipe => "a pipe to a process outside the tree",
                StdioKind::UnixStream => "a socket to a process outside the tree",
            };
            let holders = stream
                .holders
                .iter()
                .map(|(pid, fd)| format!("fd {fd} of {pid}"))
                .collect::<Vec<_>>()
                .join(", ");
            let subject = format!("standard stream {}", stream.resource);
            match choice {
                StdioChoice::Keep => Finding::refused(
                    subject,
                    format!("{what}, which stays on this host ({holders})"),
                    "say where it leads on the destination: --stdio null, --stdio journal or --stdio FILE",
                ),
                StdioChoice::Null => Finding::ok(subject, format!("{what} becomes /dev/null")),
                _ if !stream.writable => Finding::ok(
                    subject,
                    format!("{what}, only read from, becomes /dev/null"),
                ),
                StdioChoice::Journal => {
                    Finding::ok(subject, format!("{what} becomes the destination's journal"))
                }
                StdioChoice::File(path) => Finding::ok(subject, format!("{what} becomes {path}")),
            }
        })
        .collect()
}

/// Names by which CRIU's dump is told that a stream leads out of the tree.
pub(super) fn externals(stdio: &[StdioFacts]) -> Vec<String> {
    stdio
        .iter()
        .filter(|stream| matches!(stream.kind, StdioKind::Terminal | StdioKind::UnixStream))
        .map(|stream| stream.resource.clone())
        .collect()
}

/// The tree's sockets as they are at this moment.
pub(super) async fn survey(
    net: &Net,
    choices: &Choices,
    tree: &Tree,
) -> Result<TreeSockets, Error> {
    let mut options = SurveyOptions {
        forced_addresses: choices.addresses.clone(),
        in_place: choices.in_place,
        ..SurveyOptions::default()
    };
    let sockets = migrate_net::survey(net, &tree.socket_inodes()?, &options).await?;
    if sockets.doubted.is_empty() {
        return Ok(sockets);
    }
    // Connections come and go between the look at the tree and the look at
    // the kernel's sockets.
    options.doubted = sockets.doubted;
    Ok(migrate_net::survey(net, &tree.socket_inodes()?, &options).await?)
}
