//! `dist`: what is installed, and a Debian package of it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

/// What to make.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where the tree and the package go; what is there of an earlier run is replaced.
    #[arg(long, value_name = "DIR", default_value = "target/dist")]
    out: PathBuf,
    /// The program to pack, instead of one built now for release.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

/// Where units look for the program before it is packed.
const BY_HAND: &str = "/usr/local/bin/migrate";
const PACKED: &str = "/usr/bin/migrate";

/// What runs the program without being asked, and where that belongs.
const CALLERS: [(&str, &str); 4] = [
    ("usr/lib/systemd/system", "migrate-agent.service"),
    ("usr/lib/systemd/system", "migrate-guard.service"),
    ("usr/lib/systemd/system", "migrate-resume.service"),
    ("usr/lib/udev/rules.d", "60-migrate-guard.rules"),
];

/// Files of the package that an administrator may change.
const CONFIGURATION: &str = "/etc/migrate/config.toml";

/// What dpkg runs before and after, of `dist/debian`.
const MAINTAINER_SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// A shell, and where its completions belong.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/migrate"),
    ("zsh", "usr/share/zsh/vendor-completions/_migrate"),
    ("fish", "usr/share/fish/vendor_completions.d/migrate.fish"),
];

pub(crate) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the workspace")?;
    let program = match arguments.program {
        Some(program) => program,
        None => built(top)?,
    };
    let tree = arguments.out.join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("clear {}", tree.display()))?;
    }
    let installed = tree.join("usr/bin/migrate");
    install(&program, &installed, 0o755)?;
    // Names of functions stay, for a backtrace in a report.
    ran(Command::new("strip").arg("--strip-debug").arg(&installed))?;
    generated(&program, &tree)?;
    for (directory, name) in CALLERS {
        let text = read(&top.join("dist").join(name))?.replace(BY_HAND, PACKED);
        put(&tree.join(directory).join(name), text.as_bytes(), 0o644)?;
    }
    install(
        &top.join("dist/config.toml"),
        &tree.join(CONFIGURATION.trim_start_matches('/')),
        0o644,
    )?;
    let documentation = tree.join("usr/share/doc/migrate");
    for name in ["README.md", "CHANGELOG.md"] {
        install(&top.join(name), &documentation.join(name), 0o644)?;
    }
    // As in the repository, for they link to each other and README.md to them.
    install_all(&top.join("docs"), &documentation.join("docs"))?;
    put(&documentation.join("copyright"), &copyright(top)?, 0o644)?;
    for name in MAINTAINER_SCRIPTS {
        let script = top.join("dist/debian").join(name);
        install(&script, &tree.join("DEBIAN").join(name), 0o755)?;
    }
    let package = packed(&arguments.out, &tree)?;
    println!("{}", package.display());
    Ok(())
}

/// The release build of the program.
fn built(top: &Path) -> anyhow::Result<PathBuf> {
    ran(Command::new("cargo").current_dir(top).args([
        "build",
        "--release",
        "--locked",
        "-p",
        "migrate-cli",
    ]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(top.join("target"), PathBuf::from);
    Ok(target.join("release/migrate"))
}

/// Completions and manual pages, by the program itself.
fn generated(program: &Path, tree: &Path) -> anyhow::Result<()> {
    for (shell, path) in COMPLETIONS {
        let output = Command::new(program)
            .args(["completions", shell])
            .output()
            .with_context(|| format!("run {}", program.display()))?;
        ensure!(
            output.status.success(),
            "completions for {shell}: {output:?}"
        );
        put(&tree.join(path), &output.stdout, 0o644)?;
    }
    let pages = tree.join("usr/share/man/man8");
    fs::create_dir_all(&pages)?;
    ran(Command::new(program).arg("manual").arg(&pages))?;
    for page in fs::read_dir(&pages)? {
        let page = page?.path();
        fs::set_permissions(&page, fs::Permissions::from_mode(0o644))?;
        // Debian's readers expect them compressed, without a date in them.
        ran(Command::new("gzip").args(["-9n"]).arg(page))?;
    }
    Ok(())
}

/// Both licences, of which a user takes one.
fn copyright(top: &Path) -> anyhow::Result<Vec<u8>> {
    let mut text = "Either of the two, at your choice.\n\n".to_owned();
    for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
        text += &read(&top.join(licence))?;
        text += "\n";
    }
    Ok(text.into_bytes())
}

/// Makes the package.
fn packed(out: &Path, tree: &Path) -> anyhow::Result<PathBuf> {
    let architecture = said(Command::new("dpkg").arg("--print-architecture"))?;
    // A program runs with the C library it was built with, and with newer ones.
    let libc = said(Command::new("getconf").arg("GNU_LIBC_VERSION"))?;
    let libc = libc.rsplit(' ').next().unwrap_or_default();
    let version = env!("CARGO_PKG_VERSION");
    let control = format!(
        "Package: migrate\n\
         Version: {version}\n\
         Architecture: {architecture}\n\
         Maintainer: migrate developers <migrate@localhost>\n\
         Section: admin\n\
         Priority: optional\n\
         Depends: libc6 (>= {libc}), libgcc-s1\n\
         Recommends: criu (>= 4.2), openssh-client\n\
         Suggests: openssh-server\n\
         Description: moves running processes to another host, TCP connections and all\n \
         A process tree goes over while it runs; its peers stay connected and see one\n \
         short pause. Both hosts need this package, and CRIU 4.2 or newer.\n"
    );
    put(&tree.join("DEBIAN/control"), control.as_bytes(), 0o644)?;
    put(
        &tree.join("DEBIAN/conffiles"),
        format!("{CONFIGURATION}\n").as_bytes(),
        0o644,
    )?;
    open_directories(tree)?;
    let package = out.join(format!("migrate_{version}_{architecture}.deb"));
    // xz took more than a minute where builds ran beside it.
    ran(Command::new("dpkg-deb")
        .args(["--root-owner-group", "-Zgzip", "--build"])
        .args([tree, &package])
        .stdout(std::io::stderr()))?;
    Ok(package)
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn install(from: &Path, to: &Path, mode: u32) -> anyhow::Result<()> {
    let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    put(to, &bytes, mode)
}

/// Installs a directory with all that is in it.
fn install_all(from: &Path, to: &Path) -> anyhow::Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("read {}", from.display()))?;
    for entry in entries {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            install_all(&entry.path(), &to)?;
        } else {
            install(&entry.path(), &to, 0o644)?;
        }
    }
    Ok(())
}

/// Lets everybody into the directories of a tree, whatever the umask they were made
/// under.
fn open_directories(tree: &Path) -> anyhow::Result<()> {
    fs::set_permissions(tree, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("set the mode of {}", tree.display()))?;
    for entry in fs::read_dir(tree).with_context(|| format!("read {}", tree.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_directories(&entry.path())?;
        }
    }
    Ok(())
}

/// Writes a file with its directories, whatever the umask the file is made under.
fn put(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let put = || {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::write(path, bytes)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    };
    put().with_context(|| format!("write {}", path.display()))
}

fn ran(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .with_context(|| format!("run {}", command.get_program().display()))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

fn said(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .output()
        .with_context(|| format!("run {}", command.get_program().display()))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}",
        output.status
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
