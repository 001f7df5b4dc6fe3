//! Trees of this host that another one keeps: the stub that they leave here, and
//! how they come back.
//!
//! The stub is the manifest, with every image's digest, and `away.json`, which
//! names the keeper. It is on this disk before the keeper may commit, so that a boot
//! guards the connections whatever became of that; until the keeper's word is
//! known it says so, and the keeper is asked.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use migrate_channel::{Connection, Destination, Frame};
use migrate_core::journal::{Route, Side, Stage};
use migrate_core::parked::{
    Away, AwayState, ImageFile, KeptQuestion, KeptWanted, MANIFEST_BYTES_MAX, Manifest, StoreId,
};
use migrate_core::wire::{ImagePiece, Message};

use super::place::{ParkError, Place, PlaceLock, parse};
use crate::error::Error;
use crate::images::ImagePlace;
use crate::journal;
use crate::progress::{Progress, Reporter};
use crate::state::State;

/// To connect, by SSH as a rule.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// The longest silence of a keeper that reads a disk, or waits for a task of its
/// own to leave the set.
const SILENCE: Duration = Duration::from_secs(60);

/// How long a command that has rolled back waits for a keeper to clear up.
const DISOWN_LIMIT: Duration = Duration::from_secs(10);

/// How long another `migrate` may take to leave the stub.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// Another host, which is to keep a tree.
#[derive(Debug, Clone)]
pub struct Keeper {
    /// What it leaves here.
    pub stub: Place,
    /// How the host is reached.
    pub host: Destination,
    /// The same as the user said it.
    pub route: Route,
}

/// A stub that this process has made, or is about to.
#[derive(Debug, Default)]
pub(crate) struct Stub {
    store: Option<StoreId>,
    text: Vec<u8>,
    written: Option<(Place, Away, PlaceLock)>,
}

impl Stub {
    /// The keeper has begun with the set.
    pub(crate) fn begun(&mut self, store: StoreId) {
        self.store = Some(store);
    }

    /// The next piece of the manifest.
    pub(crate) fn piece(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let most = usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
        if self.text.len().saturating_add(bytes.len()) > most {
            return Err(Error::Changed("the manifest is too large".to_owned()));
        }
        self.text.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes it to the disk, for good. From here on a boot guards by it.
    pub(crate) async fn write(
        &mut self,
        to: &Keeper,
        keeper: String,
        id: &str,
        root_pid: i32,
    ) -> Result<(), Error> {
        let wrong = |what: &str| Error::Changed(format!("{keeper} has made {what}"));
        let manifest =
            parse(&std::mem::take(&mut self.text)).map_err(|source| ParkError::Manifest {
                path: to.stub.path(),
                source,
            })?;
        let of_this = (&*manifest.id, manifest.tree.root_pid) == (id, root_pid);
        if !of_this || manifest.machine_id != super::machine_id() {
            return Err(wrong("a manifest of another tree"));
        }
        let store = self.store.clone().ok_or_else(|| wrong("no store"))?;
        let place = to.stub.clone();
        place.make()?;
        let lock = place.lock(LOCK_LIMIT).await?;
        let away = pending(to, keeper, id, store);
        // Noted before it is there, and no wait from here on: a step that is dropped leaves
        // nothing that is not noted.
        let (place, away, _) = self.written.insert((place, away, lock));
        // A manifest alone would be a set whose images are gone.
        place.write_away(away)?;
        place.commit(&manifest)
    }

    pub(crate) fn is_written(&self) -> bool {
        self.written.is_some()
    }

    /// The keeper has it.
    pub(crate) fn kept(self) -> Result<(), Error> {
        let Some((place, away, _lock)) = self.written else {
            return Ok(());
        };
        kept(&place, away)
    }

    /// The tree runs on here.
    pub(crate) fn remove(&mut self) -> Result<(), Error> {
        match self.written.take() {
            Some((place, _, _lock)) => place.remove(),
            None => Ok(()),
        }
    }

    /// Makes sure that the keeper has nothing of it any more, also one that has died.
    pub(crate) async fn disown(self, to: &Keeper, keeper: String, id: &str) -> Result<(), Error> {
        let Some(store) = self.store else {
            return Ok(());
        };
        let away = pending(to, keeper, id, store);
        let asked = ask(&to.stub, &away, KeptWanted::Verdict);
        let said = tokio::time::timeout(DISOWN_LIMIT, asked).await;
        match said {
            Ok(said) => said.map(drop),
            Err(_) => Err(Error::PeerSilent {
                peer: away.keeper,
                awaited: "its word",
                waited: DISOWN_LIMIT,
            }),
        }
    }
}

/// What is known of a parking until the keeper has said that it has the tree.
fn pending(to: &Keeper, keeper: String, id: &str, store: StoreId) -> Away {
    Away {
        id: id.to_owned(),
        keeper,
        route: to.route.clone(),
        store,
        state: AwayState::Pending,
    }
}

fn kept(place: &Place, away: Away) -> Result<(), Error> {
    place.write_away(&Away {
        state: AwayState::Kept,
        ..away
    })
}

/// Removes the stub of a parking that has come to nothing, if there is one.
pub(crate) fn forget(place: &Place, id: &str) -> Result<(), Error> {
    match place.away()? {
        Some(away) if away.id == id => place.remove(),
        Some(_) | None => Ok(()),
    }
}

/// Who has the tree, by the keeper's word, which binds it; the stub is brought to
/// the same.
pub(super) async fn verdict(place: &Place, id: &str) -> Result<Stage, Error> {
    let away = place.away()?.filter(|away| away.id == id);
    let away = away.ok_or_else(|| ParkError::NoKeeper(place.path()))?;
    let stage = match ask(place, &away, KeptWanted::Verdict).await? {
        Message::VerdictIs(stage) => stage,
        other => {
            return Err(crate::inbox::unexpected(
                &away.keeper,
                &other,
                "the verdict",
            ));
        }
    };
    match stage {
        Stage::Done => kept(place, away)?,
        Stage::Undone => place.remove()?,
        _ => {}
    }
    Ok(stage)
}

/// A stub whose parking was cut off is brought to its end, before anything comes
/// from the keeper.
pub(super) async fn settle(state: &State, place: &Place, away: Away) -> Result<Away, Error> {
    let record = journal::read(state, &away.id, Side::Source)?;
    if record.is_some_and(|record| !matches!(record.stage, Stage::Done | Stage::Undone)) {
        return Err(ParkError::Unsettled(away.id).into());
    }
    if away.state == AwayState::Kept {
        return Ok(away);
    }
    match verdict(place, &away.id).await? {
        Stage::Done => Ok(away),
        _ => {
            super::disarm(state, &away.id)?;
            Err(ParkError::NeverParked {
                path: place.path(),
                keeper: away.keeper,
            }
            .into())
        }
    }
}

/// Gets the images into memory. None is used unless all of them are what was
/// parked.
pub(super) async fn fetch(
    state: &State,
    place: &Place,
    away: &Away,
    manifest: &Manifest,
    force: bool,
    reporter: &Reporter,
) -> Result<ImagePlace, Error> {
    let bytes: u64 = manifest.images.iter().map(|image| image.bytes).sum();
    let needs_bytes = bytes.saturating_mul(2);
    let available_bytes = crate::images::host_facts(state)?.memory_available_bytes;
    if available_bytes < needs_bytes {
        return Err(ParkError::NoMemory {
            needs_bytes,
            available_bytes,
        }
        .into());
    }
    let wanted = KeptWanted::Images {
        machine_id: super::machine_id(),
        force,
    };
    let mut connection = send(place, away, wanted).await?;
    reporter.tell(Progress::Connected {
        migration_id: away.id.clone(),
        destination: away.keeper.clone(),
    });
    // By the set, which this process has for itself: what one that was killed has left
    // goes first.
    let at = state.image_root()?.join(format!("{}-fetched", manifest.id));
    if at.exists() {
        ImagePlace::remove(&at).map_err(Error::file("remove", &at))?;
    }
    let fetched = ImagePlace::make(at)?;
    let images = fetched.images();
    DirBuilder::new()
        .mode(0o700)
        .create(&images)
        .map_err(Error::file("create", &images))?;
    let mut coming = Coming::new(&images, &manifest.images);
    loop {
        match next(&mut connection, away).await? {
            Frame::Image { name, last, data } => coming.piece(&ImagePiece {
                name: &name,
                last,
                data: &data,
            })?,
            Frame::Control(Message::Given) => break,
            Frame::Control(other) => {
                return Err(crate::inbox::unexpected(&away.keeper, &other, "the images"));
            }
            Frame::Pages { .. } | Frame::Packet(_) => {
                return Err(Error::Unexpected {
                    peer: away.keeper.clone(),
                    got: "pages or a packet".to_owned(),
                    awaited: "the images",
                });
            }
        }
    }
    coming.end()?;
    let _ = connection.sender.close().await;
    Ok(fetched)
}

/// Tells the keeper that the tree runs again.
pub(super) async fn done(place: &Place, away: &Away, keep: bool) -> Result<(), Error> {
    match ask(place, away, KeptWanted::Done { keep }).await? {
        Message::VerdictIs(Stage::Done) => Ok(()),
        other => Err(crate::inbox::unexpected(&away.keeper, &other, "its word")),
    }
}

async fn ask(place: &Place, away: &Away, wanted: KeptWanted) -> Result<Message, Error> {
    let mut connection = send(place, away, wanted).await?;
    let frame = next(&mut connection, away).await?;
    let _ = connection.sender.close().await;
    match frame {
        Frame::Control(message) => Ok(message),
        _ => Err(Error::Unexpected {
            peer: away.keeper.clone(),
            got: "something else than a message".to_owned(),
            awaited: "its answer",
        }),
    }
}

/// Connects, makes sure that it is the keeper, and asks.
async fn send(place: &Place, away: &Away, wanted: KeptWanted) -> Result<Connection, Error> {
    let destination = crate::source::verdict::destination(&away.route)?;
    let hello = crate::hello(&away.id);
    let mut connection = migrate_channel::connect(&destination, hello, CONNECT_LIMIT)
        .await
        .map_err(Error::Connect)?;
    let answers = connection.hello.hostname.clone();
    if answers != away.keeper {
        let keeper = away.keeper.clone();
        return Err(ParkError::OtherKeeper { keeper, answers }.into());
    }
    let question = Message::Kept(KeptQuestion {
        name: place.name().to_owned(),
        id: away.id.clone(),
        store: away.store.clone(),
        wanted,
    });
    let sent = connection.sender.control(&question).await;
    sent.map_err(|source| Error::Channel {
        peer: away.keeper.clone(),
        source,
    })?;
    Ok(connection)
}

async fn next(connection: &mut Connection, away: &Away) -> Result<Frame, Error> {
    match connection.receiver.next(SILENCE).await {
        Ok(Frame::Control(Message::Failed(error))) => Err(ParkError::Keeper {
            keeper: away.keeper.clone(),
            what: error.message,
            help: error.help,
        }
        .into()),
        Ok(frame) => Ok(frame),
        Err(error) => Err(crate::inbox::broken(&away.keeper, error, "its answer")),
    }
}

/// Images on their way, each checked as it comes.
struct Coming<'a> {
    directory: &'a Path,
    awaited: BTreeMap<&'a str, &'a ImageFile>,
    open: Option<Open<'a>>,
}

struct Open<'a> {
    image: &'a ImageFile,
    file: File,
    bytes: u64,
    hasher: blake3::Hasher,
}

impl<'a> Coming<'a> {
    fn new(directory: &'a Path, images: &'a [ImageFile]) -> Self {
        let images = images.iter();
        Self {
            directory,
            awaited: images.map(|image| (&*image.name, image)).collect(),
            open: None,
        }
    }

    fn altered(&self, name: &str, what: impl Into<String>) -> Error {
        ParkError::Altered {
            path: self.directory.join(name),
            what: what.into(),
        }
        .into()
    }

    fn piece(&mut self, piece: &ImagePiece<'_>) -> Result<(), Error> {
        let mut open = match self.open.take() {
            Some(open) if open.image.name == piece.name => open,
            Some(open) => return Err(self.altered(&open.image.name, "only a part of it came")),
            None => self.begin(piece.name)?,
        };
        open.bytes += piece.data.len() as u64;
        if open.bytes > open.image.bytes {
            let what = format!("it has more than the {} bytes it had", open.image.bytes);
            return Err(self.altered(piece.name, what));
        }
        open.hasher.update(piece.data);
        let path = self.directory.join(piece.name);
        open.file
            .write_all(piece.data)
            .map_err(Error::file("write", path))?;
        if !piece.last {
            self.open = Some(open);
            return Ok(());
        }
        if open.bytes != open.image.bytes {
            let what = format!("it has {} bytes and had {}", open.bytes, open.image.bytes);
            return Err(self.altered(piece.name, what));
        }
        if open.hasher.finalize().to_hex().as_str() != open.image.blake3 {
            return Err(self.altered(piece.name, "its content has changed"));
        }
        Ok(())
    }

    fn begin(&mut self, name: &str) -> Result<Open<'a>, Error> {
        // Once each: what came is not to be replaced by what comes later.
        let image = self
            .awaited
            .remove(name)
            .ok_or_else(|| self.altered(name, "it was not there"))?;
        let path = self.directory.join(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::file("create", path))?;
        Ok(Open {
            image,
            file,
            bytes: 0,
            hasher: blake3::Hasher::new(),
        })
    }

    fn end(&self) -> Result<(), Error> {
        let missing = self.open.as_ref().map(|open| &*open.image.name);
        match missing.or_else(|| self.awaited.keys().next().copied()) {
            Some(name) => Err(self.altered(name, "it is missing")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str, content: &[u8]) -> ImageFile {
        ImageFile {
            name: name.to_owned(),
            bytes: content.len() as u64,
            blake3: blake3::hash(content).to_hex().to_string(),
        }
    }

    /// What comes of these pieces, where `a.img` and `b.img` were parked.
    fn comes(pieces: &[(&str, &[u8], bool)]) -> Result<(), String> {
        let directory = tempfile::tempdir().unwrap();
        let images = [image("a.img", b"abc"), image("b.img", b"")];
        let mut coming = Coming::new(directory.path(), &images);
        let came = pieces.iter().try_for_each(|(name, data, last)| {
            coming.piece(&ImagePiece {
                name,
                last: *last,
                data,
            })
        });
        came.and_then(|()| coming.end())
            .map_err(|error| error.chain())?;
        assert_eq!(
            std::fs::read(directory.path().join("a.img")).unwrap(),
            b"abc"
        );
        Ok(())
    }

    #[test]
    fn images_that_come_are_what_was_parked() {
        let empty: (&str, &[u8], bool) = ("b.img", b"", true);
        comes(&[("a.img", b"abc", true), empty]).unwrap();
        comes(&[empty, ("a.img", b"a", false), ("a.img", b"bc", true)]).unwrap();
        for (pieces, words) in [
            (
                vec![("a.img", &b"abd"[..], true), empty],
                "content has changed",
            ),
            (vec![("a.img", b"ab", true), empty], "has 2 bytes and had 3"),
            (vec![("a.img", b"abcd", false)], "more than the 3 bytes"),
            (
                vec![("a.img", b"abc", true)],
                "b.img is not what was parked: it is missing",
            ),
            (
                vec![("a.img", b"a", false), empty],
                "only a part of it came",
            ),
            (
                vec![empty, ("a.img", b"abc", false)],
                "a.img is not what was parked: it is missing",
            ),
            (vec![("c.img", b"", true)], "it was not there"),
            // What has been looked at is not replaced.
            (
                vec![("a.img", b"abc", true), ("a.img", b"abc", true)],
                "it was not there",
            ),
        ] {
            let said = comes(&pieces).unwrap_err();
            assert!(said.contains(words), "{said}");
        }
    }
}
