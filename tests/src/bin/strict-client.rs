//! Asks a workload without pause and holds every reply against its request.
//!
//! Ends with one JSON line on standard output; exit code 0 only when nothing
//! was wrong.

use std::error::Error;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use migrate_tests::strict::{Keys, Options, VALUE_BYTES_MAX, Workload, default_interval, run};

/// Strict client: every reply is matched to its request, and no connection is
/// ever opened twice.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    workload: Spoken,
}

#[derive(Debug, Subcommand)]
enum Spoken {
    /// redis: INCR, SET, GET and ECHO, alone and in pipelines
    Redis {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        entries: Entries,
    },
    /// memcached: set, get and incr of the text protocol
    Memcached {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        entries: Entries,
    },
    /// echo-server: numbered bytes both ways
    Echo {
        #[command(flatten)]
        common: Common,
    },
    /// A web server: GET over keep-alive, bodies compared
    Http {
        #[command(flatten)]
        common: Common,
        /// A path to ask for; repeat it for several, asked in turn
        #[arg(long = "path", default_value = "/")]
        paths: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct Entries {
    /// Keys to write before the start or read back at the end
    #[arg(long, visible_alias = "verify-keys", default_value_t = 0)]
    keys: u64,
    /// Bytes of each key's value
    #[arg(long, default_value_t = 100, value_parser = value_bytes)]
    value_bytes: usize,
    /// Write the keys before the start
    #[arg(long)]
    populate: bool,
    /// Read the keys back at the end, over the oldest connection
    #[arg(long)]
    verify: bool,
}

impl From<Entries> for Keys {
    fn from(entries: Entries) -> Self {
        Self {
            count: entries.keys,
            value_bytes: entries.value_bytes,
            populate: entries.populate,
            verify: entries.verify,
        }
    }
}

#[derive(Debug, Args)]
struct Common {
    /// Address and port of the workload
    #[arg(long)]
    addr: SocketAddr,
    /// Connections, opened once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Microseconds between two requests of a connection [default: 1000 for
    /// one, 100 times their number for many, at least 2000]
    #[arg(long)]
    interval_us: Option<u64>,
    /// Ask after a random time of up to twice the interval
    #[arg(long)]
    random_interval: bool,
    /// Seconds to run; without it until SIGTERM, SIGINT or `stop`
    #[arg(long, value_parser = seconds)]
    duration: Option<Duration>,
    /// Milliseconds after which a reply is lost
    #[arg(long, default_value_t = 30_000)]
    reply_timeout_ms: u64,
    /// Milliseconds to wait for a workload that does not listen yet
    #[arg(long, default_value_t = 5_000)]
    connect_wait_ms: u64,
    /// Take `snapshot`, `progress N` and `stop` as lines on standard input,
    /// and its end as `stop`
    #[arg(long)]
    control: bool,
    /// Print a snapshot every second on standard error
    #[arg(long)]
    progress: bool,
    /// Print the verdict as one readable line instead of JSON
    #[arg(long)]
    human: bool,
}

fn value_bytes(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(bytes @ 1..=VALUE_BYTES_MAX) => Ok(bytes),
        _ => Err(format!("not a number from 1 to {VALUE_BYTES_MAX}")),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let (workload, common) = match Arguments::parse().workload {
        Spoken::Redis { common, entries } => (Workload::Redis(entries.into()), common),
        Spoken::Memcached { common, entries } => (Workload::Memcached(entries.into()), common),
        Spoken::Echo { common } => (Workload::Echo, common),
        Spoken::Http { common, paths } => (Workload::Http { paths }, common),
    };
    let connections = usize::from(common.connections);
    let options = Options {
        workload,
        address: common.addr,
        connections,
        random_interval: common.random_interval,
        interval: common
            .interval_us
            .map_or_else(|| default_interval(connections), Duration::from_micros),
        duration: common.duration,
        reply_timeout: Duration::from_millis(common.reply_timeout_ms),
        connect_wait: Duration::from_millis(common.connect_wait_ms),
        control: common.control,
        progress: common.progress,
    };
    match run(&options) {
        Ok(verdict) => {
            if common.human {
                println!("{verdict}");
                verdict
                    .first_errors
                    .iter()
                    .for_each(|error| eprintln!("  {error}"));
            } else {
                match serde_json::to_string(&verdict) {
                    Ok(line) => println!("{line}"),
                    Err(error) => eprintln!("strict-client: could not print the verdict: {error}"),
                }
            }
            if verdict.is_clean() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprint!("strict-client: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}
