//! `migrate agent`: the destination's side.

use std::net::SocketAddr;

use migrate_channel::StandingAgent;
use migrate_session::destination::serve;
use migrate_session::{Cancel, hello};

use super::Certificates;
use super::migrate::obey_signals;
use crate::exit::Exit;

/// How sources reach this agent.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One migration, arranged over standard input and output: what SSH starts
    #[arg(long, conflicts_with = "listen", required_unless_present = "listen")]
    pub stdio: bool,
    /// Stand and wait at this address, with --ca, --cert and --key
    #[arg(long, value_name = "IP:PORT", requires_all = ["ca", "cert", "key"])]
    pub listen: Option<SocketAddr>,
    #[command(flatten)]
    pub certificates: Certificates,
}

/// Name an agent gives itself before it knows the migration's.
const UNNAMED: &str = "agent";

pub async fn run(args: Args) -> Exit {
    let cancel = Cancel::default();
    if let Err(error) = obey_signals(cancel.clone()) {
        eprintln!("migrate agent: could not listen for signals: {error}");
        return Exit::Internal;
    }
    match args.listen {
        None => once(cancel).await,
        Some(listen) => stand(listen, &args.certificates, cancel).await,
    }
}

async fn once(cancel: Cancel) -> Exit {
    let connection = match migrate_channel::serve_stdio(hello(UNNAMED)).await {
        Ok(connection) => connection,
        Err(error) => {
            let text = migrate_session::error::chain(&error);
            tracing::error!(error = %text, "no connection");
            eprintln!("migrate agent: {text}");
            return Exit::Connect;
        }
    };
    match serve(connection, cancel).await {
        Ok(_) => Exit::Done,
        Err(error) => Exit::of(&error),
    }
}

async fn stand(listen: SocketAddr, certificates: &Certificates, cancel: Cancel) -> Exit {
    let files = match certificates.complete() {
        Ok(Some(files)) => files,
        Ok(None) => {
            eprintln!("migrate agent: --listen needs --ca, --cert and --key");
            return Exit::Usage;
        }
        Err(text) => {
            eprintln!("migrate agent: {text}");
            return Exit::Usage;
        }
    };
    let agent = match StandingAgent::bind(listen, files.ca, files.cert, files.key).await {
        Ok(agent) => agent,
        Err(error) => {
            eprintln!("migrate agent: {}", migrate_session::error::chain(&error));
            if let Some(help) = error.help() {
                eprintln!("help: {help}");
            }
            return Exit::Connect;
        }
    };
    println!("listening on {}", agent.local_addr());
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = agent.accept(hello(UNNAMED)) => accepted,
            () = cancel.cancelled() => break,
        };
        match accepted {
            Ok(connection) => {
                tasks.spawn(serve(connection, cancel.clone()));
            }
            Err(error) => {
                tracing::warn!(error = %migrate_session::error::chain(&error), "refused a connection");
            }
        }
        while tasks.try_join_next().is_some() {}
    }
    // Each migration under way is undone or, past its commit, finished.
    while tasks.join_next().await.is_some() {}
    Exit::Done
}
