//! `migrate agent`: the destination's side.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use migrate_channel::{Connection, StandingAgent};
use migrate_core::phase::Phase;
use migrate_core::policy::Policy;
use migrate_core::wire::{Message, WireError};
use migrate_session::destination::serve;
use migrate_session::{Cancel, figures, hello, policy};
use tokio::task::{Id, JoinError};

use super::Certificates;
use super::migrate::obey_signals;
use crate::exit::Exit;
use crate::metrics;
use crate::show::complain;

/// How sources reach this agent.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One migration, arranged over standard input and output: what SSH starts
    #[arg(long, conflicts_with = "listen", required_unless_present = "listen")]
    pub stdio: bool,
    /// Stand and wait at this address, with --ca, --cert and --key
    #[arg(long, value_name = "IP:PORT", requires_all = ["ca", "cert", "key"])]
    pub listen: Option<SocketAddr>,
    /// What may be restored here and by whom; without the file: everything
    #[arg(long, value_name = "FILE", env = "MIGRATE_AGENT_POLICY", default_value = policy::FILE)]
    pub policy: PathBuf,
    /// Serve Prometheus metrics to this host alone: at a loopback address or a socket
    #[arg(long, value_name = "127.0.0.1:PORT|unix:PATH", requires = "listen", value_parser = metrics::place)]
    pub metrics: Option<metrics::Place>,
    #[command(flatten)]
    pub certificates: Certificates,
}

/// Connections that are served at a time. A peer with a certificate is known, not
/// sane: each may hold a task, descriptors and memory for as long as a silence lasts.
const SERVED_MAX: usize = 64;

/// Name an agent gives itself before it knows the migration's.
const UNNAMED: &str = "agent";

pub async fn run(args: Args) -> Exit {
    let cancel = Cancel::default();
    if let Err(error) = obey_signals(cancel.clone()) {
        complain(&format!(
            "migrate agent: could not listen for signals: {error}"
        ));
        return Exit::Internal;
    }
    let policy = match policy::read(&args.policy) {
        Ok(policy) => Arc::new(policy.unwrap_or_default()),
        Err(error) => {
            complain(&format!("migrate agent: {}", error.chain()));
            if let Some(help) = error.help() {
                complain(&format!("help: {help}"));
            }
            return Exit::Usage;
        }
    };
    match args.listen {
        None => once(policy, cancel).await,
        Some(listen) => {
            if let Some(place) = &args.metrics
                && let Err(error) = metrics::serve(place)
            {
                complain(&format!("migrate agent: {error}"));
                return Exit::Usage;
            }
            stand(listen, &args.certificates, policy, cancel).await
        }
    }
}

async fn once(policy: Arc<Policy>, cancel: Cancel) -> Exit {
    let connection = match migrate_channel::serve_stdio(hello(UNNAMED)).await {
        Ok(connection) => connection,
        Err(error) => {
            let text = migrate_session::error::chain(&error);
            tracing::error!(error = %text, "no connection");
            complain(&format!("migrate agent: {text}"));
            return Exit::Connect;
        }
    };
    match serve(connection, policy, cancel).await {
        Ok(_) => Exit::Done,
        Err(error) => Exit::of(&error),
    }
}

async fn stand(
    listen: SocketAddr,
    certificates: &Certificates,
    policy: Arc<Policy>,
    cancel: Cancel,
) -> Exit {
    let files = match certificates.complete() {
        Ok(Some(files)) => files,
        Ok(None) => {
            complain("migrate agent: --listen needs --ca, --cert and --key");
            return Exit::Usage;
        }
        Err(text) => {
            complain(&format!("migrate agent: {text}"));
            return Exit::Usage;
        }
    };
    let agent = match StandingAgent::bind(listen, &files, policy.peers.as_deref()).await {
        Ok(agent) => agent,
        Err(error) => {
            complain(&format!(
                "migrate agent: {}",
                migrate_session::error::chain(&error)
            ));
            if let Some(help) = error.help() {
                complain(&format!("help: {help}"));
            }
            return Exit::Connect;
        }
    };
    println!("listening on {}", agent.local_addr());
    tokio::spawn(migrate_session::sweep::adoptions());
    let mut tasks = tokio::task::JoinSet::new();
    let mut served = HashMap::new();
    loop {
        let accepted = tokio::select! {
            accepted = agent.accept(hello(UNNAMED)) => accepted,
            () = cancel.cancelled() => break,
        };
        match accepted {
            Ok(connection) if tasks.len() >= SERVED_MAX => {
                tracing::warn!(peer = %connection.peer, "refused a connection: too many are served");
                refuse(connection).await;
            }
            Ok(connection) => {
                let id = connection.hello.migration_id.clone();
                let task = tasks.spawn(serve(connection, Arc::clone(&policy), cancel.clone()));
                served.insert(task.id(), id);
            }
            Err(error) => {
                tracing::warn!(error = %migrate_session::error::chain(&error), "refused a connection");
            }
        }
        while let Some(ended) = tasks.try_join_next_with_id() {
            clear_up(&mut served, ended.map(|(id, _)| id)).await;
        }
    }
    // Each migration under way is undone or, past its commit, finished.
    while let Some(ended) = tasks.join_next_with_id().await {
        clear_up(&mut served, ended.map(|(id, _)| id)).await;
    }
    Exit::Done
}

/// Says why, to somebody who may not listen.
async fn refuse(mut connection: Connection) {
    /// What is said fits any socket's buffer.
    const WITHIN: Duration = Duration::from_secs(1);
    let failed = Message::Failed(WireError {
        phase: Phase::Preflight,
        host: migrate_session::hostname(),
        message: format!("{SERVED_MAX} connections are served already"),
        help: Some("try again when others have ended".to_owned()),
    });
    let _ = tokio::time::timeout(WITHIN, connection.sender.control(&failed)).await;
}

/// A migration whose task has panicked has undone nothing.
async fn clear_up(served: &mut HashMap<Id, String>, ended: Result<Id, JoinError>) {
    let (id, panic) = match ended {
        Ok(id) => (id, None),
        Err(error) => (error.id(), Some(error)),
    };
    let Some(migration_id) = served.remove(&id) else {
        return;
    };
    if let Some(panic) = panic {
        figures::ended(figures::Outcome::Abandoned);
        tracing::error!(id = migration_id, %panic, "a migration's task has ended badly");
        migrate_session::recover::abandoned(&migration_id).await;
    }
}
