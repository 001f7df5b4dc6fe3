//! Trees that this host keeps for others: where they lie, and the questions of
//! the hosts that they belong to.
//!
//! ```text
//!  Verdict   is the set complete? One that is not is removed first
//!  Images    marked as taken, then every image, then Given
//!  Done      the tree runs again: the set is removed
//! ```

use std::fs::{DirBuilder, File};
use std::io::Read as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate_channel::{Connection, Sender};
use migrate_core::Phase;
use migrate_core::journal::Stage;
use migrate_core::parked::{ImageFile, KeptQuestion, KeptWanted, Manifest, Mark, StoreId};
use migrate_core::policy::{Keeping, Policy};
use migrate_core::wire::{ImagePiece, Message};
use nix::fcntl::{Flock, FlockArg};

use super::keep::unix_s;
use super::place::{ParkError, Place, PlaceLock, check_directory, read, replace};
use crate::destination::Served;
use crate::error::Error;

/// How long another question, or a keeper whose source is gone, may take to
/// leave a set.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// Bytes of an image in one frame.
const PIECE_BYTES: usize = 1 << 20;

/// A directory in which trees are kept for other hosts.
#[derive(Debug)]
pub(super) struct Store {
    directory: PathBuf,
    id: StoreId,
}

impl Store {
    /// What it is called stands in it, under a name that no set has.
    const ID_FILE: &str = ".store";

    /// Where the policy says, made where it says nothing.
    pub(super) fn make(policy: &Policy) -> Result<Self, Error> {
        let directory = Self::directory(policy)?;
        if policy.keep == Keeping::Default {
            // Root's alone: what is here is memory of other hosts' processes.
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(Error::file("create", directory))?;
        }
        check_directory(directory)?;
        // Two that come at the same time name it once.
        let file = File::open(directory).map_err(Error::file("open", directory))?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| Error::file("lock", directory)(errno.into()))?;
        if let Some(store) = Self::read(directory)? {
            return Ok(store);
        }
        let id = StoreId(crate::source::migration_id()?);
        replace(&directory.join(Self::ID_FILE), &id)?;
        Ok(Self {
            directory: directory.to_owned(),
            id,
        })
    }

    /// The one that a set was put into. Where it is not, nothing can be said of
    /// the set.
    fn open(policy: &Policy, id: &StoreId) -> Result<Self, Error> {
        let directory = Self::directory(policy)?;
        check_directory(directory)?;
        let store = Self::read(directory)?.filter(|store| store.id == *id);
        store.ok_or_else(|| ParkError::OtherStore(directory.to_owned()).into())
    }

    fn directory(policy: &Policy) -> Result<&Path, Error> {
        let directory = policy.keeps()?;
        if !directory.is_absolute() {
            return Err(ParkError::RelativeStore(directory.to_owned()).into());
        }
        Ok(directory)
    }

    fn read(directory: &Path) -> Result<Option<Self>, Error> {
        let id = read(directory.join(Self::ID_FILE))?;
        Ok(id.map(|id| Self {
            directory: directory.to_owned(),
            id,
        }))
    }

    pub(super) fn id(&self) -> &StoreId {
        &self.id
    }

    pub(super) fn place(&self, name: &str) -> Result<Place, Error> {
        Ok(Place::new(&self.directory, name)?)
    }
}

/// Answers one question.
///
/// # Errors
///
/// There is no answer; whoever asked has been told why.
pub(crate) async fn answer(
    mut connection: Connection,
    question: KeptQuestion,
    policy: &Policy,
) -> Result<Served, Error> {
    let by = connection.hello.hostname.clone();
    let answered = reply(&mut connection.sender, &question, policy, by).await;
    if let Err(error) = &answered {
        tracing::warn!(error = %error.chain(), "nothing is kept or given");
        let failed = error.as_message(Phase::Preflight, crate::hostname());
        // Whoever has asked may not listen.
        let _ = connection.sender.control(&failed).await;
    }
    let _ = connection.sender.close().await;
    answered.map(|()| Served::Asked)
}

async fn reply(
    sender: &mut Sender,
    question: &KeptQuestion,
    policy: &Policy,
    by: String,
) -> Result<(), Error> {
    let store = Store::open(policy, &question.store)?;
    let place = store.place(&question.name)?;
    let broken = |source| Error::Channel {
        peer: by.clone(),
        source,
    };
    match &question.wanted {
        KeptWanted::Verdict => {
            let stage = super::stands(&place, &question.id).await?;
            crate::pause::at("judged");
            let answer = Message::VerdictIs(stage);
            sender.control(&answer).await.map_err(broken)
        }
        KeptWanted::Images { machine_id, force } => {
            let (_lock, manifest) = asked_for(&place, &question.id).await?;
            may_take(
                place.path(),
                &manifest,
                place.mark()?,
                machine_id.as_deref(),
                *force,
            )?;
            place.write_mark(&Mark::Taken {
                by: by.clone(),
                machine_id: machine_id.clone(),
                unix_s: unix_s(),
            })?;
            crate::pause::at("taken");
            for image in &manifest.images {
                give(sender, &place, image, &by).await?;
            }
            sender.control(&Message::Given).await.map_err(broken)
        }
        KeptWanted::Done { keep } => {
            let (_lock, _) = asked_for(&place, &question.id).await?;
            if *keep {
                place.write_mark(&Mark::Resumed {
                    unix_s: unix_s(),
                    images_kept: true,
                })?;
            } else {
                place.remove()?;
            }
            let answer = Message::VerdictIs(Stage::Done);
            sender.control(&answer).await.map_err(broken)
        }
    }
}

/// The set, if it is the one that is meant, for as long as the first value lives.
async fn asked_for(place: &Place, id: &str) -> Result<(PlaceLock, Manifest), Error> {
    // Where there is none there is no lock either.
    place.manifest()?;
    let lock = place.lock(LOCK_LIMIT).await?;
    let manifest = place.manifest()?;
    if manifest.id != id {
        return Err(ParkError::OtherTree(place.path()).into());
    }
    Ok((lock, manifest))
}

/// It goes to the machine that it came from, as often as that one asks: whether it
/// has run there is on that one's disk. But not when anybody else may have run it.
fn may_take(
    path: PathBuf,
    manifest: &Manifest,
    mark: Option<Mark>,
    machine_id: Option<&str>,
    force: bool,
) -> Result<(), ParkError> {
    let is_its_own = |id: Option<&str>| manifest.machine_id.as_deref() == id;
    if !is_its_own(machine_id) && !force {
        return Err(ParkError::OtherMachine(manifest.host.hostname.clone()));
    }
    let what = match mark {
        None => return Ok(()),
        Some(Mark::Taken { machine_id, .. }) if is_its_own(machine_id.as_deref()) => return Ok(()),
        Some(Mark::Resumed {
            images_kept: false, ..
        }) => return Err(ParkError::ImagesGone(path)),
        Some(Mark::Taken { by, .. }) => format!("was given to {by}, which may run it"),
        Some(Mark::Resuming { .. }) => {
            "was resumed where it was kept, and may run there".to_owned()
        }
        Some(Mark::Resumed { .. }) => "was resumed before".to_owned(),
    };
    if force {
        return Ok(());
    }
    Err(ParkError::MayHaveRun { path, what })
}

/// Sends one image. Whether it is what was parked is for the other host to say,
/// which has the digests.
async fn give(
    sender: &mut Sender,
    place: &Place,
    image: &ImageFile,
    peer: &str,
) -> Result<(), Error> {
    let path = place.images().join(&image.name);
    let mut file = File::open(&path).map_err(Error::file("open", &path))?;
    let mut left = image.bytes;
    loop {
        let length = PIECE_BYTES.min(usize::try_from(left).unwrap_or(PIECE_BYTES));
        let mut data = vec![0; length];
        file.read_exact(&mut data)
            .map_err(Error::file("read", &path))?;
        left -= length as u64;
        let piece = ImagePiece {
            name: &image.name,
            last: left == 0,
            data: &data,
        };
        let sent = sender.image(piece).await;
        sent.map_err(|source| Error::Channel {
            peer: peer.to_owned(),
            source,
        })?;
        if left == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use migrate_core::parked::MANIFEST_VERSION;
    use migrate_core::wire::StdioChoice;

    use super::*;

    #[test]
    fn a_set_goes_to_its_machine_alone_and_while_nobody_else_has_it() {
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            release: String::new(),
            id: "park-1".to_owned(),
            parked_unix_s: 0,
            machine_id: Some("one".to_owned()),
            boot_id: String::new(),
            host: migrate_proc::host_facts(Path::new("/")),
            tree: migrate_core::facts::TreeFacts::default(),
            stdio: StdioChoice::Keep,
            tracked: Vec::new(),
            ended: Vec::new(),
            patience: Vec::new(),
            images: Vec::new(),
        };
        let takes = |mark: Option<Mark>, machine_id, force| {
            let path = PathBuf::from("/srv/kept/tree");
            may_take(path, &manifest, mark, machine_id, force).map_err(|error| error.to_string())
        };
        let taken = |by: &str| {
            Some(Mark::Taken {
                by: format!("host-{by}"),
                machine_id: Some(by.to_owned()),
                unix_s: 1,
            })
        };
        let resumed = |images_kept| {
            Some(Mark::Resumed {
                unix_s: 1,
                images_kept,
            })
        };
        let one = Some("one");
        for mark in [None, taken("one")] {
            takes(mark.clone(), one, false).unwrap();
            for other in [Some("two"), None] {
                let said = takes(mark.clone(), other, false).unwrap_err();
                assert!(said.contains("another machine"), "{said}");
            }
        }
        let here = Some(Mark::Resuming {
            id: "resume-1".to_owned(),
            boot_id: String::new(),
        });
        for (mark, words) in [
            (taken("two"), "was given to host-two"),
            (here, "may run there"),
            (resumed(true), "was resumed before"),
        ] {
            let said = takes(mark.clone(), one, false).unwrap_err();
            assert!(said.contains(words), "{said}");
            takes(mark, one, true).unwrap();
        }
        assert!(takes(resumed(false), one, true).is_err());
    }
}
