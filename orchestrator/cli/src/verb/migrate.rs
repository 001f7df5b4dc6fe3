//! The default verb: move a tree.

use std::net::IpAddr;
use std::time::Duration;

use migrate_channel::StreamOptions;
use migrate_core::convergence::{OnTimeout, Policy};
use migrate_core::stream::{Compress, STREAMS_MAX};
use migrate_core::unit::AdoptChoice;
use migrate_core::wire::{NetworkLock, RestoreChoice, StdioChoice};
use migrate_session::source::{self, Choices, EngineChoice, MemoryEngine, Request, Target};
use migrate_session::{Cancel, Reporter};
use tokio::signal::unix::{SignalKind, signal};

use super::Certificates;
use super::report::Keep;
use crate::Output;
use crate::exit::Exit;
use crate::show::Show;

/// What to move, and where to.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Root of the process tree
    #[arg(value_name = "PID", required = true)]
    pub pid: Option<i32>,
    /// Where to: [user@]host over SSH, or host:port of a standing agent
    #[arg(long, value_name = "[USER@]HOST|HOST:PORT", required = true)]
    pub to: Option<String>,
    #[command(flatten)]
    pub tree: TreeArgs,
    #[command(flatten)]
    pub rounds: RoundArgs,
    /// Roll back when the tree has stood still for this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = Choices::MAX_BLACKOUT.as_secs_f64(), value_parser = seconds)]
    pub max_blackout: f64,
    #[command(flatten)]
    pub keep: Keep,
}

/// What can be said about the tree; also for `check`.
#[derive(Debug, Clone, clap::Args)]
pub struct TreeArgs {
    #[command(flatten)]
    pub certificates: Certificates,
    /// Where standard streams lead that lead out of the tree: keep, journal, null, or a file
    #[arg(long, value_name = "keep|journal|null|FILE", default_value = "keep", value_parser = stdio)]
    pub stdio: StdioChoice,
    /// Move this address although it looks like the host's own
    #[arg(long = "address", value_name = "IP")]
    pub addresses: Vec<IpAddr>,
    /// What if something would start a second copy when the tree ends here: refuse, or
    /// ignore it because you have seen to it
    #[arg(long, value_name = "refuse|ignore", value_enum, default_value_t = SupervisorChoice::Refuse)]
    pub supervisor: SupervisorChoice,
    /// Which unit takes the tree where systemd runs the destination: the service it was, if
    /// that is there and down, or else a scope (auto); a scope; or none
    #[arg(long, value_name = "auto|scope|none", value_enum, default_value_t = AdoptName::Auto)]
    pub adopt: AdoptName,
    /// How unchanged memory is told in rounds: the kernel tracks it (uffd); CRIU asks for the
    /// kernel's soft-dirty marks, and the tree stands still for a moment in each round
    /// (soft-dirty); or all of it is read and compared, also of the frozen tree (full). auto takes
    /// the first of these that works
    #[arg(long, value_name = "auto|uffd|soft-dirty|full", value_enum, default_value_t = EngineName::Auto)]
    pub engine: EngineName,
    /// What keeps peers' packets from the frozen tree, to compare: our gate, which holds them, or
    /// drops them (drop); CRIU by nftables or iptables, which drops them; or nothing (skip), which
    /// loses what peers send meanwhile
    #[arg(long, value_name = "gate|drop|nftables|iptables|skip", value_enum, default_value_t = LockName::Gate)]
    pub network_lock: LockName,
}

/// When rounds of pre-copy end.
#[derive(Debug, Clone, clap::Args)]
pub struct RoundArgs {
    /// Freeze when a round finds this many percent of the memory unchanged
    #[arg(long, value_name = "PERCENT", default_value_t = 90, value_parser = clap::value_parser!(u8).range(0..=101))]
    pub goal: u8,
    /// And when the blackout would be no longer than this many milliseconds
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub downtime_limit: u64,
    /// At most so many rounds
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_iterations: u32,
    /// Begin no round after so many seconds of rounds. One that runs then is finished, for what
    /// it has not sent would go in the blackout; with --on-timeout cancel it is given up at once.
    /// The first pauses for a tree that would wait for CPUs because of it, but not beyond half of
    /// that
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<f64>,
    /// When rounds end without their goal: freeze all the same, cancel, or hand over before
    /// all memory has gone over (see --postcopy)
    #[arg(long, value_name = "freeze|cancel|postcopy", value_enum, default_value_t = OnTimeoutName::Freeze)]
    pub on_timeout: OnTimeoutName,
    /// Connections that carry pages; one a core and at most four by default
    #[arg(long, value_name = "N", default_value_t = Choices::default_streams(), value_parser = clap::value_parser!(u32).range(1..=i64::from(STREAMS_MAX)))]
    pub streams: u32,
    /// Compress pages: when that is faster than the network, as measured (auto), never, or always
    #[arg(long, value_name = "auto|none|lz4", value_enum, default_value_t = CompressName::Auto)]
    pub compress: CompressName,
    /// Use at most so much of the network in rounds: bytes a second (100M, 1.5G), or bits
    /// (800Mbit). The frozen tree is not held to it, nor is what the copy waits for after
    /// --postcopy
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub bandwidth: Option<u64>,
    /// When the copy gets its memory: all of it before it runs (eager), while it runs, what it
    /// touches first (lazy), or lazy where processes have 16 MiB or more each, on an average,
    /// and little in common (auto)
    #[arg(long, value_name = "auto|eager|lazy", value_enum, default_value_t = RestoreName::Auto)]
    pub restore: RestoreName,
    /// Hand over before the frozen tree's memory has gone over, and send it while the copy runs,
    /// what it touches first. The blackout no longer depends on how fast memory changes, but until
    /// everything has arrived the tree needs both hosts: if the source, `migrate` there, or the
    /// network between them fails in that time, the tree is LOST
    #[arg(long, conflicts_with = "on_timeout")]
    pub postcopy: bool,
    /// Compare the copy's memory with the frozen tree's before the commit; takes its time
    #[arg(long)]
    pub verify: bool,
}

impl RoundArgs {
    fn stream(&self) -> StreamOptions {
        StreamOptions {
            compress: match self.compress {
                CompressName::Auto => Compress::Auto,
                CompressName::None => Compress::None,
                CompressName::Lz4 => Compress::Lz4,
            },
            limit_bytes_per_s: self.bandwidth,
        }
    }

    fn policy(&self) -> Policy {
        Policy {
            goal_percent: self.goal,
            downtime_limit_us: Some(self.downtime_limit.saturating_mul(1000)),
            max_iterations: self.max_iterations,
            timeout_us: self
                .timeout
                .map(|s| u64::try_from(Duration::from_secs_f64(s).as_micros()).unwrap_or(u64::MAX)),
            on_timeout: match self.on_timeout {
                OnTimeoutName::Freeze => OnTimeout::Freeze,
                OnTimeoutName::Cancel => OnTimeout::Cancel,
                OnTimeoutName::Postcopy => OnTimeout::Postcopy,
            },
        }
    }
}

/// Names of engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineName {
    /// The best that works.
    Auto,
    /// Rounds, tracked by userfaultfd.
    Uffd,
    /// Rounds by CRIU, tracked by the kernel's soft-dirty marks.
    SoftDirty,
    /// Rounds, compared by content.
    Full,
}

impl From<EngineName> for EngineChoice {
    fn from(name: EngineName) -> Self {
        match name {
            EngineName::Auto => Self::Auto,
            EngineName::Uffd => Self::Only(MemoryEngine::Uffd),
            EngineName::SoftDirty => Self::Only(MemoryEngine::SoftDirty),
            EngineName::Full => Self::Only(MemoryEngine::Full),
        }
    }
}

/// Names of network locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LockName {
    /// The gate holds packets.
    Gate,
    /// The gate drops them.
    Drop,
    /// CRIU drops them.
    Nftables,
    /// CRIU drops them.
    Iptables,
    /// Nothing does.
    Skip,
}

impl From<LockName> for NetworkLock {
    fn from(name: LockName) -> Self {
        match name {
            LockName::Gate => Self::Gate,
            LockName::Drop => Self::Drop,
            LockName::Nftables => Self::Nftables,
            LockName::Iptables => Self::Iptables,
            LockName::Skip => Self::Skip,
        }
    }
}

/// When pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CompressName {
    /// When it is faster than the network.
    Auto,
    /// Never.
    None,
    /// Always.
    Lz4,
}

/// When the copy gets its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RestoreName {
    /// Lazy where that pays.
    Auto,
    /// Before it runs.
    Eager,
    /// While it runs.
    Lazy,
}

impl From<RestoreName> for RestoreChoice {
    fn from(name: RestoreName) -> Self {
        match name {
            RestoreName::Lazy => Self::Lazy,
            RestoreName::Eager => Self::Eager,
            RestoreName::Auto => Self::Auto,
        }
    }
}

/// What to do when rounds end without their goal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OnTimeoutName {
    /// Freeze; the blackout is longer.
    Freeze,
    /// Give up; the tree runs on.
    Cancel,
    /// Freeze, and hand over before all memory has gone over.
    Postcopy,
}

/// What to do about a supervisor that cannot be told to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SupervisorChoice {
    /// Do not move the tree.
    Refuse,
    /// The user has seen to it.
    Ignore,
}

/// Which unit takes a tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AdoptName {
    /// Its service, or else a scope.
    #[default]
    Auto,
    /// A scope.
    Scope,
    /// None.
    None,
}

impl From<AdoptName> for AdoptChoice {
    fn from(name: AdoptName) -> Self {
        match name {
            AdoptName::Auto => Self::Auto,
            AdoptName::Scope => Self::Scope,
            AdoptName::None => Self::None,
        }
    }
}

pub fn stdio(text: &str) -> Result<StdioChoice, String> {
    match text {
        "keep" => Ok(StdioChoice::Keep),
        "journal" => Ok(StdioChoice::Journal),
        "null" => Ok(StdioChoice::Null),
        file if file.starts_with('/') => Ok(StdioChoice::File(file.to_owned())),
        other => Err(format!(
            "`{other}` is none of keep, journal, null, and no absolute path of a file on the destination"
        )),
    }
}

pub fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text
        .parse()
        .map_err(|_| format!("`{text}` is no number of seconds"))?;
    if (0.01..=3600.0).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{value} is not between 0.01 and 3600 seconds"))
    }
}

/// A rate as people write it, in bytes a second.
fn rate(text: &str) -> Result<u64, String> {
    const FORMS: &str = "write bytes a second as 500K, 100M or 1.5G, or bits as 800Mbit";
    let wrong = || format!("`{text}` is no rate: {FORMS}");
    let (number, bits) = match text.strip_suffix("bit") {
        Some(number) => (number, true),
        None => (text, false),
    };
    let (number, unit) = match number.chars().last() {
        Some('k' | 'K') => (&number[..number.len() - 1], 1e3),
        Some('m' | 'M') => (&number[..number.len() - 1], 1e6),
        Some('g' | 'G') => (&number[..number.len() - 1], 1e9),
        _ => (number, 1.0),
    };
    if !number.chars().all(|c| c.is_ascii_digit() || c == '.') {
        return Err(wrong());
    }
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let bytes_per_s = number * unit / if bits { 8.0 } else { 1.0 };
    // Slower, and a single page would take the patience of every peer; faster
    // is no limit.
    if !(10e3..=1e12).contains(&bytes_per_s) {
        return Err(format!(
            "{text} is not between 10K and 1000G bytes a second"
        ));
    }
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "within the range checked above"
    )]
    Ok(bytes_per_s as u64)
}

pub async fn run(args: Args, output: &Output) -> Exit {
    let show = Show::new(output);
    // clap has made sure of both.
    let (Some(pid), Some(to)) = (args.pid, args.to) else {
        return Exit::Usage;
    };
    let destination = match super::destination(&to, &args.tree.certificates) {
        Ok(destination) => destination,
        Err(text) => {
            show.usage(&text);
            return Exit::Usage;
        }
    };
    let request = Request {
        pid,
        target: Target::Host(destination),
        route: super::route(&to, &args.tree.certificates),
        choices: Choices {
            stdio: args.tree.stdio,
            addresses: args.tree.addresses,
            max_blackout: Duration::from_secs_f64(args.max_blackout),
            engine: args.tree.engine.into(),
            policy: args.rounds.policy(),
            streams: args.rounds.streams,
            stream: args.rounds.stream(),
            verify: args.rounds.verify,
            restore: args.rounds.restore.into(),
            postcopy: args.rounds.postcopy,
            lock: args.tree.network_lock.into(),
            adopt: args.tree.adopt.into(),
            ignore_supervisor: args.tree.supervisor == SupervisorChoice::Ignore,
            in_place: false,
        },
    };
    let cancel = Cancel::default();
    if let Err(error) = obey_signals(cancel.clone()) {
        show.usage(&format!("could not listen for signals: {error}"));
        return Exit::Internal;
    }
    let (reporter, mut events) = Reporter::channel();
    let shown = tokio::spawn(async move {
        let mut show = show;
        while let Some(event) = events.recv().await {
            show.progress(&event);
        }
        show
    });
    let outcome = source::migrate(request, reporter, cancel).await;
    // The reporter is gone, so the task ends once it has shown everything.
    let Ok(mut show) = shown.await else {
        return Exit::Internal;
    };
    let report = match &outcome {
        Ok(report) => Some(report),
        Err(failure) => failure.report.as_deref(),
    };
    if let Some(report) = report {
        super::report::leave(report, &args.keep, &mut show);
    }
    match outcome {
        Ok(report) => {
            show.report(&report);
            Exit::Done
        }
        Err(failure) => {
            let exit = Exit::of_failure(&failure);
            show.failure(pid, &failure, exit as u8);
            exit
        }
    }
}

/// Ctrl-C and friends ask for a rollback.
pub fn obey_signals(cancel: Cancel) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            cancel.cancel();
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_as_people_write_them() {
        for (text, bytes_per_s) in [
            ("100M", 100_000_000),
            ("1.5G", 1_500_000_000),
            ("1G", 1_000_000_000),
            ("20000", 20_000),
            ("500k", 500_000),
            ("800Mbit", 100_000_000),
            ("1Gbit", 125_000_000),
        ] {
            assert_eq!(rate(text), Ok(bytes_per_s), "{text}");
        }
        for text in [
            "", "M", "bit", "fast", "-1M", "+1M", "1e9", "1T", "0", "9K", "100MB", "100 M", "nan",
            "inf", "2000G", "1Mbyte", "Mbit",
        ] {
            assert!(rate(text).is_err(), "{text}");
        }
    }
}
