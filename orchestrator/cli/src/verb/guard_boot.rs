//! `migrate guard-boot`: gates for parked trees, before there is an address.

use std::path::PathBuf;

use migrate_core::report::counted;
use migrate_session::Error;
use migrate_session::park::{self, ParkError, Place};

use crate::exit::Exit;

/// Which trees.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where trees were parked
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Only these sets
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
}

pub async fn run(args: &Args) -> Exit {
    let places = if args.names.is_empty() {
        Place::all(&args.dir)
    } else {
        let named = args.names.iter().map(|name| Place::new(&args.dir, name));
        named.collect::<Result<_, _>>().map_err(Into::into)
    };
    let places = match places {
        Ok(places) => places,
        Err(error) => return failed(&error),
    };
    let mut exit = Exit::Done;
    for place in &places {
        match park::guard(place).await {
            Ok(Some(guarded)) => println!(
                "{}: nothing answers for {} on {}{}",
                guarded.name,
                counted(guarded.connections, "connection"),
                counted(guarded.interfaces, "interface"),
                if guarded.was_there { ", as before" } else { "" }
            ),
            Ok(None) => {}
            // What was not parked to the end has no connections to guard.
            Err(Error::Park(ParkError::Unfinished(path))) => {
                eprintln!("{} was not parked to the end", path.display());
            }
            Err(error) => exit = failed(&error),
        }
    }
    exit
}

fn failed(error: &Error) -> Exit {
    eprintln!("migrate guard-boot: {}", error.chain());
    if let Some(help) = error.help() {
        eprintln!("help: {help}");
    }
    Exit::of(error)
}
