//! Where a parked tree lies on disk, and how it gets there for good.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use migrate_core::parked::{
    Away, ImageFile, MANIFEST_BYTES_MAX, MANIFEST_VERSION, Manifest, Mark, is_plain,
};
use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::error::Error;

/// Why a manifest cannot be used.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// It is no manifest, or only a part of one.
    #[error("is no manifest of a parked tree, or only a part of one")]
    Malformed(#[source] serde_json::Error),
    /// Another version's.
    #[error(
        "was written in version {found} of the format by migrate {release}, and this is version {MANIFEST_VERSION}"
    )]
    Version {
        /// The version.
        found: u32,
        /// The release that has written it.
        release: String,
    },
    /// A name that could lead out of the directory.
    #[error("names the image {0:?}, which is no plain file name")]
    Name(String),
}

/// Reads a manifest. Its version is looked at before anything else.
pub(crate) fn parse(text: &[u8]) -> Result<Manifest, ManifestError> {
    #[derive(Deserialize)]
    struct Head {
        version: u32,
        #[serde(default)]
        release: String,
    }
    let head: Head = serde_json::from_slice(text).map_err(ManifestError::Malformed)?;
    if head.version != MANIFEST_VERSION {
        return Err(ManifestError::Version {
            found: head.version,
            release: head.release,
        });
    }
    let manifest: Manifest = serde_json::from_slice(text).map_err(ManifestError::Malformed)?;
    if let Some(image) = manifest.images.iter().find(|image| !is_plain(&image.name)) {
        return Err(ManifestError::Name(image.name.clone()));
    }
    Ok(manifest)
}

/// Why a directory cannot be parked in or resumed from.
#[derive(Debug, Error)]
pub enum ParkError {
    /// There is none.
    #[error("{} does not exist", .0.display())]
    Missing(PathBuf),
    /// It is something else.
    #[error("{} is no directory", .0.display())]
    NoDirectory(PathBuf),
    /// Somebody else could have changed it.
    #[error(
        "{} can be changed by others than root (owner {owner}, mode {mode:04o})",
        path.display()
    )]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// No set of this name may be made.
    #[error("`{0}` cannot name a parked tree")]
    Name(String),
    /// A new set of this name would lie where a mark does.
    #[error("`{0}` is the name of a file that marks a tree")]
    MarksName(String),
    /// It holds nothing that was parked.
    #[error("{} holds no parked tree", .0.display())]
    Nothing(PathBuf),
    /// The parking did not come to its end.
    #[error("{} has no manifest: the tree was not parked to the end", .0.display())]
    Unfinished(PathBuf),
    /// The manifest cannot be used.
    #[error("{}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// An image is not what was written.
    #[error("{} is not what was parked: {what}", path.display())]
    Altered {
        /// The image.
        path: PathBuf,
        /// In which respect.
        what: String,
    },
    /// It holds a tree that waits.
    #[error("{} holds a parked tree already", .0.display())]
    Occupied(PathBuf),
    /// It holds something that is not ours.
    #[error("{} holds something else than a parked tree: {entry}", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// One thing in it.
        entry: String,
    },
    /// Another machine's tree.
    #[error("the tree was parked on another machine, {0}")]
    OtherMachine(String),
    /// It may run, or have run, since it was parked.
    #[error("the tree in {} {what}", path.display())]
    MayHaveRun {
        /// The set.
        path: PathBuf,
        /// What became of it.
        what: String,
    },
    /// Its images are gone.
    #[error("the images in {} were removed when the tree was resumed", .0.display())]
    ImagesGone(PathBuf),
    /// The host that was to keep the tree has not taken it.
    #[error("{keeper} was to keep the tree of {} and has not taken it", path.display())]
    NeverParked {
        /// The stub, which has been removed.
        path: PathBuf,
        /// The host.
        keeper: String,
    },
    /// A record of the same parking is open.
    #[error("what became of the parking {0} has not been settled on this host")]
    Unsettled(String),
    /// Nothing says any more who keeps the tree.
    #[error("{} does not say which host keeps the tree", .0.display())]
    NoKeeper(PathBuf),
    /// Another host answers at the keeper's address.
    #[error("{answers} answers for {keeper}, which keeps the tree")]
    OtherKeeper {
        /// Who keeps it.
        keeper: String,
        /// Who has answered.
        answers: String,
    },
    /// The keeper's directory is not the one that the tree was put into.
    #[error("{} is not the directory that the tree was put into", .0.display())]
    OtherStore(PathBuf),
    /// The keeper has an answer of its own.
    #[error("{keeper}, which keeps the tree, says: {what}")]
    Keeper {
        /// The keeper.
        keeper: String,
        /// What it says.
        what: String,
        /// And what can be done.
        help: Option<String>,
    },
    /// The keeper has another tree of this name.
    #[error("{} holds another tree than the one that is asked for", .0.display())]
    OtherTree(PathBuf),
    /// A policy's directory could be anywhere.
    #[error("{}, where the policy has trees kept, is not an absolute path", .0.display())]
    RelativeStore(PathBuf),
    /// What is kept elsewhere does not fit here.
    #[error("the images have {} MiB, and {} MiB of memory are available", needs_bytes >> 20, available_bytes >> 20)]
    NoMemory {
        /// Twice the images: they come into memory, and the tree is made of them.
        needs_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// Another `migrate` is at work there.
    #[error("another migrate is at work in {}", .0.display())]
    Busy(PathBuf),
    /// No tree is marked under this name.
    #[error("nothing is marked as {name} in {}", directory.display())]
    NotMarked {
        /// Where.
        directory: PathBuf,
        /// The name.
        name: String,
    },
    /// No tree is marked at all.
    #[error("nothing is marked in {}", .0.display())]
    NoneMarked(PathBuf),
    /// A mark is none, or only a part of one.
    #[error("{} is no mark of a tree", path.display())]
    BadMark {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It is marked, under another name.
    #[error("process {pid} is marked as {name} already")]
    MarkedAs {
        /// Its root.
        pid: i32,
        /// Where.
        directory: PathBuf,
        /// The name.
        name: String,
    },
    /// What was marked runs no longer.
    #[error("process {pid}, marked as {name}, does not run any more")]
    MarkedGone {
        /// Its root, as it was.
        pid: i32,
        /// Where.
        directory: PathBuf,
        /// The name.
        name: String,
    },
    /// No interface has come up.
    #[error("there is no interface yet but the loopback")]
    NoInterface,
    /// Named by whoever told of it.
    #[error("there is no interface {0}, by name or by number")]
    NoSuchInterface(String),
}

impl ParkError {
    /// A way out.
    #[must_use]
    pub fn help(&self) -> String {
        match self {
            Self::Missing(path) => format!(
                "to park, make it first: mkdir -m 700 {0}; to resume, mount the disk that it is on",
                path.display()
            ),
            Self::NoDirectory(_) => "name a directory".to_owned(),
            Self::NotPrivate { path, .. } => format!(
                "what is resumed from there runs as root: chown root {0} && chmod 700 {0}",
                path.display()
            ),
            Self::MarksName(_) => format!("use a name that does not end in {MARK_SUFFIX}"),
            Self::Name(_) => {
                "use up to 128 letters, digits and any of -_.@+ behind the first".to_owned()
            }
            Self::Nothing(_) => {
                "see what is there with `migrate resume --list --dir DIR`, and name it with --name".to_owned()
            }
            Self::Unfinished(path) => format!(
                "whatever was to be parked has gone on running or is lost; rm -r {} when you are sure",
                path.display()
            ),
            Self::Manifest { source, .. } => match source {
                ManifestError::Version { release, .. } => {
                    format!("resume it with migrate {release}")
                }
                ManifestError::Malformed(_) | ManifestError::Name(_) => {
                    "restore the directory from a copy; nothing was changed here".to_owned()
                }
            },
            Self::Altered { .. } => {
                "nothing was restored; bring the directory back from a copy, or start the workload anew".to_owned()
            }
            Self::Occupied(path) => format!(
                "resume it, or park under another --name, or rm -r {} to give that tree up",
                path.display()
            ),
            Self::Foreign { .. } => "name an empty directory".to_owned(),
            Self::OtherMachine(_) => {
                "resume it there; with --force it is resumed here, and must then never be resumed there".to_owned()
            }
            Self::MayHaveRun { .. } => {
                "its peers may have gone on with it, and a second copy would take them back in time; \
                 --force resumes it all the same"
                    .to_owned()
            }
            Self::ImagesGone(_) => {
                "start the workload anew; `resume --keep` keeps images".to_owned()
            }
            Self::NeverParked { .. } => {
                "it went on running here, or was lost with the boot; the stub is removed and its gate gone: start the workload anew if it does not run".to_owned()
            }
            Self::Unsettled(_) => "run `migrate recover`, then this again".to_owned(),
            Self::NoKeeper(path) => format!(
                "bring {} back from a copy; the host that keeps the tree has it as it was",
                path.join("away.json").display()
            ),
            Self::OtherKeeper { keeper, .. } => {
                format!("see to it that {keeper} is reached by the name that `park --to` was given")
            }
            Self::OtherStore(path) => format!(
                "mount the disk that was at {} at the parking (and see `keep` in the agent's policy), then try again",
                path.display()
            ),
            Self::Keeper { keeper, help, .. } => help.clone().unwrap_or_else(|| {
                format!("see the log of `migrate` on {keeper} (`/run/migrate/log`)")
            }),
            Self::OtherTree(_) => {
                "the one that is asked for was resumed or removed there".to_owned()
            }
            Self::RelativeStore(_) => "name it from the root directory on".to_owned(),
            Self::NoMemory { .. } => "free memory, then try again; nothing was changed".to_owned(),
            Self::Busy(_) => "wait for it".to_owned(),
            Self::NotMarked { directory, .. } => {
                format!("see what is: migrate mark --dir {}", directory.display())
            }
            Self::NoneMarked(directory) => format!(
                "name PIDs, or mark trees first: migrate mark PID --dir {}",
                directory.display()
            ),
            Self::BadMark { path, .. } => {
                format!("rm {}, and mark the tree anew", path.display())
            }
            Self::MarkedAs {
                directory, name, ..
            } => format!(
                "leave it, or take that mark away: migrate unmark {name} --dir {}",
                directory.display()
            ),
            Self::MarkedGone {
                directory, name, ..
            } => format!(
                "mark the one that runs now: migrate mark PID --name {name} --dir {0}; or none: \
                 migrate unmark {name} --dir {0}",
                directory.display()
            ),
            Self::NoInterface => {
                "run this after the interface has come, and before it gets its address; or with \
                 --interfaces-follow, if the udev rule of the package is there"
                    .to_owned()
            }
            Self::NoSuchInterface(_) => "`ip link` lists those of this host".to_owned(),
        }
    }
}

/// One named set in a directory of the user's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    directory: PathBuf,
    name: String,
    /// What lies here is a stub: another host has the images.
    stub: bool,
}

/// Held while somebody works in a [`Place`].
#[derive(Debug)]
pub(crate) struct PlaceLock(
    #[cfg_attr(not(test), expect(dead_code, reason = "held for its lock"))] Flock<File>,
);

impl Place {
    /// What a record's route begins with when a tree goes to a directory. No
    /// host has such a name.
    const ROUTE: &str = "directory:";

    /// The same for a stub: who has the tree then stands in it.
    const STUB_ROUTE: &str = "stub:";

    /// The set `name` in `directory`.
    ///
    /// # Errors
    ///
    /// The name cannot be one.
    pub fn new(directory: &Path, name: &str) -> Result<Self, ParkError> {
        if !is_plain(name) {
            return Err(ParkError::Name(name.to_owned()));
        }
        // Read again by others, wherever they run.
        let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        Ok(Self {
            directory,
            name: name.to_owned(),
            stub: false,
        })
    }

    /// The same for a tree that another host is to keep.
    #[must_use]
    pub fn for_stub(self) -> Self {
        Self { stub: true, ..self }
    }

    /// Whether another host has the images.
    pub(crate) fn is_stub(&self) -> bool {
        self.stub
    }

    /// All sets in a directory, by name.
    ///
    /// # Errors
    ///
    /// It is not there, or not private.
    pub fn all(directory: &Path) -> Result<Vec<Self>, Error> {
        check_directory(directory)?;
        let entries = fs::read_dir(directory).map_err(Error::file("read", directory))?;
        let mut places: Vec<Self> = entries
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .filter_map(|entry| Self::new(directory, entry.file_name().to_str()?).ok())
            .filter(|place| {
                let parts = [place.manifest_path(), place.images(), place.away_path()];
                parts.iter().any(|part| part.exists())
            })
            .collect();
        places.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(places)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// The directory that it is in.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.path().join("images")
    }

    fn manifest_path(&self) -> PathBuf {
        self.path().join("manifest.json")
    }

    fn away_path(&self) -> PathBuf {
        self.path().join("away.json")
    }

    fn mark_path(&self) -> PathBuf {
        self.path().join("mark.json")
    }

    /// For a record: how to ask what became of the tree.
    #[must_use]
    pub fn route(&self) -> String {
        let kind = if self.stub {
            Self::STUB_ROUTE
        } else {
            Self::ROUTE
        };
        format!("{kind}{}", self.path().display())
    }

    /// The other way round; none for a host.
    #[must_use]
    pub fn of_route(route: &str) -> Option<Self> {
        let stub = route.strip_prefix(Self::STUB_ROUTE);
        let path = Path::new(stub.or_else(|| route.strip_prefix(Self::ROUTE))?);
        let place = Self::new(path.parent()?, path.file_name()?.to_str()?).ok()?;
        Some(Self {
            stub: stub.is_some(),
            ..place
        })
    }

    /// Whether something new may have this name: it must not be the file that
    /// marks another tree. What has it already can be resumed all the same.
    pub(super) fn check_name(&self) -> Result<(), ParkError> {
        let name = self.name.trim_end_matches(UNFINISHED);
        if name.ends_with(MARK_SUFFIX) {
            return Err(ParkError::MarksName(self.name.clone()));
        }
        Ok(())
    }

    /// Claims it for this process.
    ///
    /// # Errors
    ///
    /// Another one is at work there, still after `limit`.
    pub(crate) async fn lock(&self, limit: Duration) -> Result<PlaceLock, Error> {
        /// Nothing tells of a lock that is free but the lock.
        const AGAIN: Duration = Duration::from_millis(20);
        let path = self.path();
        let deadline = Instant::now() + limit;
        loop {
            let file = File::open(&path).map_err(Error::file("open", &path))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // Whoever held it may have removed the directory, and another have made it.
                Ok(lock) if is_at(&lock, &path) => return Ok(PlaceLock(lock)),
                Ok(_) => {}
                Err(_) if Instant::now() < deadline => tokio::time::sleep(AGAIN).await,
                Err(_) => return Err(ParkError::Busy(path).into()),
            }
        }
    }

    /// Whether a tree may be parked here; `true` when something unfinished or
    /// used up has to be cleared away for it.
    pub(crate) fn is_free(&self) -> Result<bool, Error> {
        self.check_name()?;
        check_directory(&self.directory)?;
        let path = self.path();
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::file("read", &path)(error)),
        };
        let mut any = false;
        for entry in entries.flatten() {
            let entry = entry.file_name().to_string_lossy().into_owned();
            let ours = ["images", "manifest.json", "mark.json", "away.json"];
            if !ours.contains(&entry.trim_end_matches(UNFINISHED)) {
                return Err(ParkError::Foreign { path, entry }.into());
            }
            any = true;
        }
        if self.manifest_path().exists() && !matches!(self.mark()?, Some(Mark::Resumed { .. })) {
            return Err(ParkError::Occupied(path).into());
        }
        Ok(any)
    }

    /// Makes its directory, empty.
    pub(crate) fn make(&self) -> Result<(), Error> {
        if self.is_free()? {
            // What makes it a parked tree goes first.
            self.remove()?;
        }
        let path = self.path();
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(Error::file("create", &path)(error))
            }
            Ok(()) | Err(_) => sync(&self.directory),
        }
    }

    /// Removes everything, so that no part of it is taken for a whole.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        for path in [self.manifest_path(), self.mark_path(), self.away_path()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::file("remove", path)(error));
                }
                Ok(()) | Err(_) => {}
            }
        }
        if self.path().exists() {
            sync(&self.path())?;
            fs::remove_dir_all(self.path()).map_err(Error::file("remove", self.path()))?;
        }
        Ok(())
    }

    /// The manifest of a tree that was parked to the end.
    ///
    /// # Errors
    ///
    /// There is none, it cannot be used, or others could have changed it.
    pub fn manifest(&self) -> Result<Manifest, Error> {
        check_directory(&self.directory)?;
        let path = self.path();
        if !path.exists() {
            return Err(ParkError::Nothing(path).into());
        }
        check_directory(&path)?;
        let path = self.manifest_path();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ParkError::Unfinished(self.path()).into());
            }
            Err(error) => return Err(Error::file("open", path)(error)),
        };
        let mut text = Vec::new();
        file.take(MANIFEST_BYTES_MAX)
            .read_to_end(&mut text)
            .map_err(Error::file("read", &path))?;
        parse(&text).map_err(|source| ParkError::Manifest { path, source }.into())
    }

    /// Who keeps the images; none where they are here.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn away(&self) -> Result<Option<Away>, Error> {
        read(self.away_path())
    }

    pub(crate) fn write_away(&self, away: &Away) -> Result<(), Error> {
        replace(&self.away_path(), away)
    }

    /// How far it has come back; none while it waits.
    ///
    /// # Errors
    ///
    /// The mark cannot be read.
    pub fn mark(&self) -> Result<Option<Mark>, Error> {
        // Not understood, it says all the same that there was an attempt.
        read(self.mark_path())
    }

    pub(crate) fn write_mark(&self, mark: &Mark) -> Result<(), Error> {
        replace(&self.mark_path(), mark)
    }

    pub(crate) fn remove_mark(&self) -> Result<(), Error> {
        let path = self.mark_path();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::file("remove", path)(error))
            }
            Ok(()) | Err(_) => sync(&self.path()),
        }
    }

    /// Puts the manifest in its place: from here on the tree is parked.
    pub(crate) fn commit(&self, manifest: &Manifest) -> Result<(), Error> {
        replace(&self.manifest_path(), manifest)?;
        sync(&self.directory)
    }

    /// Gets the images onto the disk and takes their digests.
    pub(crate) fn persist(&self) -> Result<Vec<ImageFile>, Error> {
        let directory = self.images();
        let mut files = Vec::new();
        let entries = fs::read_dir(&directory).map_err(Error::file("read", &directory))?;
        for entry in entries {
            let path = entry.map_err(Error::file("read", &directory))?.path();
            let file = File::open(&path).map_err(Error::file("open", &path))?;
            file.sync_all().map_err(Error::file("write", &path))?;
            let (bytes, blake3) = digest(&path, &file)?;
            let name = path
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            files.push(ImageFile {
                name,
                bytes,
                blake3,
            });
        }
        sync(&directory)?;
        sync(&self.path())?;
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    }

    /// Compares the images with what was written.
    pub(crate) fn verify(&self, manifest: &Manifest) -> Result<(), Error> {
        let directory = self.images();
        let altered = |path: &Path, what: String| ParkError::Altered {
            path: path.to_owned(),
            what,
        };
        for image in &manifest.images {
            let path = directory.join(&image.name);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(altered(&path, "it is missing".to_owned()).into());
                }
                Err(error) => return Err(Error::file("open", path)(error)),
            };
            let size = file
                .metadata()
                .map_err(Error::file("examine", &path))?
                .len();
            if size != image.bytes {
                let what = format!("it has {size} bytes and had {}", image.bytes);
                return Err(altered(&path, what).into());
            }
            let (_, blake3) = digest(&path, &file)?;
            if blake3 != image.blake3 {
                return Err(altered(&path, "its content has changed".to_owned()).into());
            }
        }
        let entries = fs::read_dir(&directory).map_err(Error::file("read", &directory))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            if !manifest.images.iter().any(|image| *image.name == *name) {
                return Err(altered(&entry.path(), "it was not there".to_owned()).into());
            }
        }
        Ok(())
    }
}

/// Whether an open file is still what has this name.
fn is_at(file: &File, path: &Path) -> bool {
    let of = |meta: fs::Metadata| (meta.dev(), meta.ino());
    let (open, named) = (file.metadata().map(of), fs::metadata(path).map(of));
    matches!((open, named), (Ok(open), Ok(named)) if open == named)
}

/// Ends the name of a file that marks a tree.
pub(super) const MARK_SUFFIX: &str = ".tree";

/// Ends the name of a file that is being written.
const UNFINISHED: &str = ".new";

/// A directory that root alone can change.
pub(super) fn check_directory(path: &Path) -> Result<(), Error> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ParkError::Missing(path.to_owned()).into());
        }
        Err(error) => return Err(Error::file("examine", path)(error)),
    };
    if !meta.is_dir() {
        return Err(ParkError::NoDirectory(path.to_owned()).into());
    }
    if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        return Err(ParkError::NotPrivate {
            path: path.to_owned(),
            owner: meta.uid(),
            mode: meta.mode() & 0o7777,
        }
        .into());
    }
    Ok(())
}

/// What a small file holds; none where there is no such file.
pub(super) fn read<T: DeserializeOwned>(path: PathBuf) -> Result<Option<T>, Error> {
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| Error::file("understand", path)(error.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read", path)(error)),
    }
}

/// Replaces a file as a whole, for good.
pub(super) fn replace(path: &Path, content: &impl Serialize) -> Result<(), Error> {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    let fresh = PathBuf::from(name);
    let text =
        serde_json::to_vec(content).map_err(|error| Error::file("encode", path)(error.into()))?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)
        .map_err(Error::file("create", &fresh))?;
    file.write_all(&text)
        .and_then(|()| file.sync_all())
        .map_err(Error::file("write", &fresh))?;
    fs::rename(&fresh, path).map_err(Error::file("rename", &fresh))?;
    sync(path.parent().unwrap_or(Path::new("/")))
}

pub(super) fn sync(directory: &Path) -> Result<(), Error> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::file("write", directory))
}

fn digest(path: &Path, file: &File) -> Result<(u64, String), Error> {
    let mut hasher = blake3::Hasher::new();
    let bytes = io::copy(
        &mut io::BufReader::with_capacity(1 << 20, file),
        &mut hasher,
    )
    .map_err(Error::file("read", path))?;
    Ok((bytes, hasher.finalize().to_hex().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_named_before_anything_else() {
        let text = br#"{"version": 2, "release": "9.0.0", "unheard-of": []}"#;
        let error = parse(text).unwrap_err();
        assert!(
            matches!(&error, ManifestError::Version { found: 2, release } if release == "9.0.0"),
            "{error}"
        );
        for text in [&b""[..], b"{", b"[]", br#"{"version": 1}"#] {
            let error = parse(text).unwrap_err();
            assert!(matches!(error, ManifestError::Malformed(_)), "{error}");
        }
    }

    #[test]
    fn a_set_does_not_lie_where_a_mark_does() {
        let named = |name| Place::new(Path::new("/var/lib/parked"), name).unwrap();
        for name in ["front", "tree", "front.tree.1"] {
            named(name).check_name().unwrap();
        }
        for name in ["front.tree", "front.tree.new"] {
            let error = named(name).check_name().unwrap_err();
            assert!(error.help().contains(".tree"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_lock_is_on_what_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::new(directory.path(), "tree").unwrap();
        let missing = place.lock(Duration::ZERO).await.unwrap_err();
        assert!(missing.chain().contains("tree"), "{missing:?}");
        fs::create_dir(place.path()).unwrap();
        let held = place.lock(Duration::ZERO).await.unwrap();
        let busy = place.lock(Duration::ZERO).await.unwrap_err();
        assert!(matches!(busy, Error::Park(ParkError::Busy(_))), "{busy:?}");
        // What is made in its place is nobody's yet, whatever became of the former.
        fs::remove_dir(place.path()).unwrap();
        assert!(!is_at(&held.0, &place.path()));
        fs::create_dir(place.path()).unwrap();
        assert!(!is_at(&held.0, &place.path()));
        place.lock(Duration::ZERO).await.unwrap();
    }

    #[test]
    fn a_route_leads_back_to_its_place() {
        let place = Place::new(Path::new("/var/lib/parked"), "redis").unwrap();
        let stub = place.clone().for_stub();
        assert_ne!(place.route(), stub.route());
        for place in [place, stub] {
            assert_eq!(Place::of_route(&place.route()), Some(place));
        }
        assert_eq!(Place::of_route("host2"), None);
        assert_eq!(Place::of_route("directory:/"), None);
    }
}
