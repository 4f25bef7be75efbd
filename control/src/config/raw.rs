//! What was typed: one file read into known keys with checked values and places, and everything in
//! it that is not a known key reported with the nearest name.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{self, Key, Section};
use super::problem::{Origin, Problem, Source, quoted};
use super::suggest::nearest;
use super::value::Value;

/// A configuration longer than this is refused.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Faults of the syntax that are told of one file.
const SYNTAX_ERRORS_MAX: usize = 3;

/// Which file is read, and so which tables it may have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum FileKind {
    /// `corelane.toml`.
    Main,
    /// `cores.d/<n>.toml`: only `[core]`, without `cpus`.
    Core,
}

/// A key with the value that was typed for it.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: &'static Key,
    pub(super) value: Value,
    pub(super) at: Origin,
}

/// One table of a file.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) section: Section,
    pub(super) at: Origin,
    pub(super) entries: Vec<Entry>,
    /// Names that were typed with a value that was refused: reported, not missing.
    pub(super) refused: Vec<&'static str>,
}

/// One file.
#[derive(Clone, Debug)]
pub(super) struct RawFile {
    pub(super) name: Arc<str>,
    pub(super) tables: Vec<Table>,
    /// It could not be read or is not TOML: what it says is unknown.
    pub(super) broken: bool,
}

impl RawFile {
    /// No file.
    pub(super) fn empty() -> Self {
        Self {
            name: "".into(),
            tables: Vec::new(),
            broken: false,
        }
    }

    fn broken(name: Arc<str>) -> Self {
        Self {
            name,
            tables: Vec::new(),
            broken: true,
        }
    }

    /// The first place of the file.
    pub(super) fn start(&self) -> Origin {
        Origin::File {
            path: Arc::clone(&self.name),
            line: 1,
            column: 1,
        }
    }

    /// The `index`-th table of a section.
    pub(super) fn table(&self, section: Section, index: usize) -> Option<&Table> {
        self.tables
            .iter()
            .filter(|table| table.section == section)
            .nth(index)
    }

    /// How many tables of a section there are.
    pub(super) fn count(&self, section: Section) -> usize {
        self.tables
            .iter()
            .filter(|table| table.section == section)
            .count()
    }
}

/// Reads a file from disk. A fault of the whole file (missing, too long, not UTF-8, not TOML) is
/// reported like any other.
pub(super) fn read_file(path: &Path, kind: FileKind, problems: &mut Vec<Problem>) -> RawFile {
    let name: Arc<str> = path.to_string_lossy().into();
    let mut broken = |problem| {
        problems.push(problem);
        RawFile::broken(Arc::clone(&name))
    };
    let start = || Origin::File {
        path: Arc::clone(&name),
        line: 1,
        column: 1,
    };
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    if let Err(error) = read {
        return broken(Problem::error(
            start(),
            format!("cannot be read: {}", plain(&error)),
            "name a file that can be read, with --config",
        ));
    }
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return broken(Problem::error(
            start(),
            "is longer than 1 MiB",
            "name a configuration file, with --config",
        ));
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => read_text(Arc::clone(&name), text, kind, problems),
        Err(error) => {
            let good = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
            let at = Source {
                path: Arc::clone(&name),
                text: &good,
            }
            .at(good.len());
            broken(Problem::error(at, "is not UTF-8", "save the file as UTF-8"))
        }
    }
}

/// An I/O error as a user reads it: without the number that the standard library appends.
pub(crate) fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    text.chars()
        .take(1)
        .flat_map(char::to_lowercase)
        .chain(text.chars().skip(1))
        .collect()
}

/// Reads a file that is already in memory.
pub(super) fn read_text(
    path: Arc<str>,
    text: &str,
    kind: FileKind,
    problems: &mut Vec<Problem>,
) -> RawFile {
    let source = Source { path, text };
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        // One that is not closed makes many of what follows it.
        for error in errors.iter().take(SYNTAX_ERRORS_MAX) {
            let at = source.at(error.span().map_or(0, |span| span.start));
            let first = error.message().lines().next().unwrap_or("not understood");
            problems.push(Problem::error(
                at,
                format!("not valid TOML: {first}"),
                "write key = value, with text in double quotes, under a [table]",
            ));
        }
        return RawFile::broken(source.path);
    }
    let file = RawFile {
        name: Arc::clone(&source.path),
        tables: Vec::new(),
        broken: false,
    };
    let mut reader = Reader {
        source,
        kind,
        problems,
        file,
    };
    // The parser sorts by name; tables are to be numbered as they stand in the file.
    let mut top: Vec<_> = document.get_ref().iter().collect();
    top.sort_by_key(|(name, _)| name.span().start);
    for (name, value) in top {
        reader.top(name.get_ref(), name.span().start, value);
    }
    reader.file
}

struct Reader<'t, 'p> {
    source: Source<'t>,
    kind: FileKind,
    problems: &'p mut Vec<Problem>,
    file: RawFile,
}

impl Reader<'_, '_> {
    fn sections(&self) -> impl Iterator<Item = Section> + use<> {
        let kind = self.kind;
        let allowed = move |section: &Section| kind == FileKind::Main || *section == Section::Core;
        Section::ALL.into_iter().filter(allowed)
    }

    fn error(&mut self, offset: usize, what: String, instead: String) {
        self.problems
            .push(Problem::error(self.source.at(offset), what, instead));
    }

    /// One name at the top of the file.
    fn top(&mut self, name: &str, offset: usize, value: &Spanned<DeValue<'_>>) {
        let Some(section) = self.sections().find(|section| section.name() == name) else {
            return self.unknown_top(name, offset, value);
        };
        match value.get_ref() {
            DeValue::Table(table) if !section.repeats() => self.table(section, offset, table),
            DeValue::Array(items) if section.repeats() => {
                for item in items.iter() {
                    match item.get_ref() {
                        DeValue::Table(table) => self.table(section, item.span().start, table),
                        _ => self.error(
                            item.span().start,
                            format!("{name} holds something that is no table"),
                            format!("write {} above its keys", section.header()),
                        ),
                    }
                }
            }
            DeValue::Table(_) => self.error(
                offset,
                format!("[{name}] is written once for each {name}"),
                format!("write {}", section.header()),
            ),
            DeValue::Array(items) if items.iter().all(|item| item.get_ref().is_table()) => self
                .error(
                    offset,
                    format!("[[{name}]] is written only once"),
                    format!("write {}", section.header()),
                ),
            _ => self.error(
                offset,
                format!("{name} is a table, not a key"),
                format!("write {} and its keys below", section.header()),
            ),
        }
    }

    fn unknown_top(&mut self, name: &str, offset: usize, value: &Spanned<DeValue<'_>>) {
        let tables = self
            .sections()
            .map(Section::header)
            .collect::<Vec<_>>()
            .join(", ");
        let elsewhere = Section::ALL
            .into_iter()
            .find(|section| section.name() == name);
        if let Some(section) = elsewhere {
            return self.error(
                offset,
                format!("{} is not for a file of one core", section.header()),
                "move it to the main file".into(),
            );
        }
        let is_table = value.get_ref().is_table()
            || value.get_ref().as_array().is_some_and(|items| {
                !items.is_empty() && items.iter().all(|item| item.get_ref().is_table())
            });
        if is_table {
            let instead = match nearest(name, self.sections().map(Section::name)) {
                Some(near) => format!("did you mean \"{near}\"?"),
                None => format!("known are {tables}"),
            };
            return self.error(offset, format!("unknown table {}", quoted(name)), instead);
        }
        let owner = self
            .sections()
            .find(|&section| keys::of(section).any(|k| k.name == name));
        let instead = match owner {
            Some(section) => format!("write it under {}", section.header()),
            None => format!("known are the tables {tables}"),
        };
        self.error(
            offset,
            format!("unknown key {} outside any table", quoted(name)),
            instead,
        );
    }

    fn table(&mut self, section: Section, offset: usize, table: &DeTable<'_>) {
        let at = self.source.at(offset);
        let mut read = Table {
            section,
            at,
            entries: Vec::new(),
            refused: Vec::new(),
        };
        for (name, value) in table.iter() {
            let Some(key) = keys::of(section).find(|key| key.name == name.get_ref().as_ref())
            else {
                self.unknown_key(section, name.get_ref(), name.span().start);
                continue;
            };
            if self.kind == FileKind::Core && !key.per_core() {
                let what = format!("{} is the same for every core", key.name);
                self.error(name.span().start, what, "move it to the main file".into());
                continue;
            }
            if self.kind == FileKind::Main && key.only_per_core() {
                let what = format!("{} is of one core", key.name);
                let instead = "move it to cores.d/<n>.toml, n being the core".into();
                self.error(name.span().start, what, instead);
                continue;
            }
            let start = value.span().start;
            match key.kind.read_toml(key, value.get_ref()) {
                Ok(value) => read.entries.push(Entry {
                    key,
                    value,
                    at: self.source.at(start),
                }),
                Err(fault) => {
                    read.refused.push(key.name);
                    self.error(start, fault.what, fault.instead);
                }
            }
        }
        self.file.tables.push(read);
    }

    fn unknown_key(&mut self, section: Section, name: &str, offset: usize) {
        let names = || keys::of(section).map(|key| key.name);
        let owner = self
            .sections()
            .find(|&other| other != section && keys::of(other).any(|key| key.name == name));
        let instead = match (nearest(name, names()), owner) {
            (_, Some(owner)) => format!("it belongs under {}", owner.header()),
            (Some(near), None) => format!("did you mean \"{near}\"?"),
            (None, None) => format!("known are {}", names().collect::<Vec<_>>().join(", ")),
        };
        let what = format!("unknown key {} in {}", quoted(name), section.header());
        self.error(offset, what, instead);
    }
}
