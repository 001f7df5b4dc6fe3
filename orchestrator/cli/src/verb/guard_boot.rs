//! `migrate guard-boot`: gates for parked trees, before there is an address.
//!
//! Its unit takes [`Exit::Refused`] for success: the host is mute then, or there
//! is no directory to guard anything of, and it may have a network. Whatever
//! else fails keeps the network down.

use std::path::{Path, PathBuf};

use migrate_core::report::counted;
use migrate_session::Error;
use migrate_session::park::{self, Guarded, Interfaces, ParkError, Place};

use crate::exit::Exit;
use crate::show::{complain, say};

/// Which trees.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where trees were parked
    #[arg(long, value_name = "DIR", required_unless_present = "interface")]
    pub dir: Option<PathBuf>,
    /// Only these sets
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
    /// Interfaces that are not there yet are told of with --interface, as the udev rule of
    /// the package does: none need be here
    #[arg(long)]
    pub interfaces_follow: bool,
    /// Only puts what guards already on this interface, a name or a number: it has just come
    #[arg(long, value_name = "INTERFACE", conflicts_with_all = ["dir", "names", "interfaces_follow"])]
    pub interface: Option<String>,
}

pub async fn run(args: &Args) -> Exit {
    let come = if args.interfaces_follow {
        Interfaces::Follow
    } else {
        Interfaces::Here
    };
    match (&args.interface, &args.dir) {
        (Some(interface), _) => one_more(interface),
        (None, Some(dir)) => all(dir, &args.names, come).await,
        (None, None) => Exit::Usage,
    }
}

/// An interface has come.
fn one_more(interface: &str) -> Exit {
    match park::guard_interface(interface) {
        Ok(0) => Exit::Done,
        Ok(gates) => {
            say(&format!(
                "{interface}: {} there, too",
                counted(gates, "gate")
            ));
            Exit::Done
        }
        Err(error) => failed(&error),
    }
}

async fn all(dir: &Path, names: &[String], come: Interfaces) -> Exit {
    let places = if names.is_empty() {
        Place::all(dir)
    } else {
        let named = names.iter().map(|name| Place::new(dir, name));
        named.collect::<Result<_, _>>().map_err(Into::into)
    };
    let places = match places {
        Ok(places) => places,
        // Nothing is parked in a directory that is none.
        Err(error @ Error::Park(ParkError::Missing(_) | ParkError::NoDirectory(_))) => {
            return failed(&error);
        }
        Err(error @ Error::Park(ParkError::Name(_))) => return failed(&error),
        Err(error) => {
            failed(&error);
            return mute(come).await;
        }
    };
    let mut is_complete = true;
    for place in &places {
        match park::guard(place, come).await {
            Ok(Some(guarded)) => tell(&guarded),
            Ok(None) => {}
            // What was not parked to the end has no connections to guard.
            Err(Error::Park(ParkError::Unfinished(path))) => {
                complain(&format!("{} was not parked to the end", path.display()));
            }
            Err(error) => {
                failed(&error);
                is_complete = false;
            }
        }
    }
    if !is_complete {
        return mute(come).await;
    }
    // Only whoever has looked at all sets can tell that none is missed.
    if names.is_empty() {
        match park::speak() {
            Ok(true) => say("all sets are guarded: this host sends resets again"),
            Ok(false) => {}
            Err(error) => return failed(&error),
        }
    }
    Exit::Done
}

fn tell(guarded: &Guarded) {
    say(&format!(
        "{}: nothing answers for {} on {}{}",
        guarded.name,
        counted(guarded.connections, "connection"),
        counted(guarded.interfaces, "interface"),
        if guarded.was_there { ", as before" } else { "" }
    ));
    if !guarded.missing.is_empty() {
        say(&format!(
            "{}: {} is not there yet: nothing answers if it has another name now or is made of \
             what is there{}",
            guarded.name,
            guarded.missing.join(", "),
            if guarded.follows {
                ", nor when it comes"
            } else {
                ""
            }
        ));
    }
}

/// Some connections are not known: no reset leaves for any.
async fn mute(come: Interfaces) -> Exit {
    match park::mute(come).await {
        Ok(()) => {
            complain(
                "this host sends no resets at all, for those connections are not known\n\
                 help: put right what is named above, or remove that set to give its tree up; then \
                 run `migrate guard-boot` again",
            );
            Exit::Refused
        }
        Err(error) => {
            complain("nothing is guarded: the network must not come up");
            match failed(&error) {
                // Which says that the host is mute.
                Exit::Refused => Exit::Internal,
                exit => exit,
            }
        }
    }
}

fn failed(error: &Error) -> Exit {
    complain(&format!("migrate guard-boot: {}", error.chain()));
    if let Some(help) = error.help() {
        complain(&format!("help: {help}"));
    }
    Exit::of(error)
}
