//! What tuning sees of a host: files below a root that tests replace, and the program `ethtool`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A host.
#[derive(Clone, Debug)]
pub struct View {
    root: PathBuf,
    ethtool: PathBuf,
}

impl View {
    /// This host.
    pub fn host() -> Self {
        Self::of(Path::new("/"), Path::new("ethtool"))
    }

    /// A host whose files are below `root`, and whose devices `ethtool` knows.
    pub fn of(root: &Path, ethtool: &Path) -> Self {
        Self {
            root: root.to_owned(),
            ethtool: ethtool.to_owned(),
        }
    }

    /// Where a file of the host lies; absolute or not, it is below the root.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A small file's text, if it can be read.
    pub fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// A number in a file of its own.
    pub fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    /// Names in a folder, sorted, numbers by value; none where there is no such folder.
    pub fn list(&self, path: impl AsRef<Path>) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(path)) else {
            return Vec::new();
        };
        let name = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
        let mut names: Vec<String> = entries.filter_map(name).collect();
        names.sort_by_key(|name| {
            let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
            (
                name.len() - digits.len(),
                digits.parse::<u64>().unwrap_or(u64::MAX),
                name.clone(),
            )
        });
        names
    }

    /// Writes a file of the kernel.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn write(&self, path: impl AsRef<Path>, text: &str) -> io::Result<()> {
        fs::write(self.path(path), format!("{text}\n"))
    }

    /// Runs `ethtool`.
    ///
    /// # Errors
    /// It is not installed, or answers with an error, whose text is the error's.
    pub fn ethtool(&self, args: &[&str]) -> io::Result<String> {
        let output: Output = Command::new(&self.ethtool)
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or("it failed without a word");
        Err(io::Error::other(said.to_owned()))
    }
}
