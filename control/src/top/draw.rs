//! A sight becomes a page of text: on a terminal of 80 columns and 24 lines, or on one of any size.
//!
//! ```text
//! corelane 0.1.0 at 127.0.0.1:9090, up 2m 3s                     two lines of the process
//! CORE CPU GEAR  REQ/S ...                                       its cores
//! ROUTE, INSTANCE          REQ/S ...                             its routes and their instances
//! discovery  etcd, ...                                           what it is connected with
//! GPU POOL  STATE  HOLDER ...                                    locks of GPU memory
//! q quit  s sort ...                                             keys
//! ```
//! What does not fit is on further pages.

use std::time::Duration;

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Row, Table, Widget};

use super::sight::{CoreRow, Figures, InstanceRow, PoolRow, RouteRow, Sight, Sort};

const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const TITLE: Style = Style::new().add_modifier(Modifier::REVERSED);
const BAD: Style = Style::new().fg(Color::Red);
/// Lines that a section is left with, if it has as many.
const SECTION_MIN: usize = 3;

/// What is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum View {
    /// Everything.
    #[default]
    All,
    /// Cores.
    Cores,
    /// Routes and instances.
    Routes,
    /// What the process is connected with.
    Planes,
    /// Locks of GPU memory.
    Gpu,
}

impl View {
    /// In the order of their keys, from 1.
    pub const ALL: [Self; 5] = [
        Self::All,
        Self::Cores,
        Self::Routes,
        Self::Planes,
        Self::Gpu,
    ];

    /// The next one.
    #[must_use]
    pub fn next(self) -> Self {
        let place = Self::ALL.iter().position(|view| *view == self);
        Self::ALL[place.map_or(0, |place| (place + 1) % Self::ALL.len())]
    }
}

/// What the user has chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ui {
    /// What is shown.
    pub view: View,
    /// What by.
    pub sort: Sort,
    /// Which page of what does not fit.
    pub page: usize,
    /// Nothing is asked for now.
    pub paused: bool,
}

/// A page.
pub struct Frame<'a> {
    /// What is seen; none before the first answer.
    pub sight: Option<&'a Sight>,
    /// The process: `HOST:PORT`.
    pub address: &'a str,
    /// Why nothing newer is seen.
    pub trouble: Option<&'a str>,
    /// What is shown of it.
    pub ui: Ui,
    /// Whether to name the keys.
    pub keys: bool,
}

/// A table, ready but for its place.
struct Section {
    head: Vec<(&'static str, Constraint)>,
    rows: Vec<(Vec<String>, Style)>,
}

impl Frame<'_> {
    /// Lines that it has when nothing is left out.
    pub fn lines(&self) -> u16 {
        let sections = self.sections(u16::MAX);
        let rows = sections.iter().map(|section| section.rows.len() + 1);
        let lines = 2 + rows.sum::<usize>() + usize::from(self.keys);
        u16::try_from(lines).unwrap_or(u16::MAX)
    }

    /// The same page as plain text, `width` columns wide, all rows of it.
    pub fn text(&self, width: u16) -> String {
        let area = Rect::new(0, 0, width, self.lines());
        let mut buffer = Buffer::empty(area);
        self.render(area, &mut buffer);
        let mut out = String::new();
        for y in 0..area.height {
            let cells = (0..width).map(|x| buffer[(x, y)].symbol());
            let line: String = cells.collect();
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }

    /// Draws it.
    pub fn render(&self, area: Rect, buffer: &mut Buffer) {
        let mut lines = self.head();
        lines.truncate(area.height.into());
        let mut y = area.y;
        for line in lines {
            buffer.set_line(area.x, y, &line, area.width);
            y += 1;
        }
        let keys = u16::from(self.keys && area.bottom() > y);
        let sections = self.sections(area.width);
        let left = usize::from(area.bottom() - y - keys);
        let shares = share(&sections, left);
        let most = sections.iter().zip(&shares);
        let pages = most.map(|(section, lines)| section.pages(*lines)).max();
        for (section, lines) in sections.iter().zip(&shares) {
            let height = u16::try_from(*lines).unwrap_or(u16::MAX);
            let place = Rect::new(area.x, y, area.width, height);
            section.table(*lines, self.ui.page).render(place, buffer);
            y += height;
        }
        if keys > 0 {
            let line = self.keys_line(pages.unwrap_or(1));
            buffer.set_line(area.x, area.bottom() - 1, &line, area.width);
        }
    }

    fn head(&self) -> Vec<Line<'static>> {
        let Some(sight) = self.sight else {
            let text = self.trouble.unwrap_or("waiting for the first answer");
            let title = format!("corelane at {}", self.address);
            return vec![Line::styled(title, BOLD), Line::raw(text.to_owned())];
        };
        let head = &sight.head;
        let first = format!(
            "corelane {} at {}, up {}{}",
            head.program,
            self.address,
            uptime(head.uptime),
            if head.draining { ", DRAINING" } else { "" },
        );
        let second = match self.trouble {
            Some(trouble) => Line::styled(trouble.to_owned(), BAD),
            None => Line::raw(format!(
                "{}/s requests, {}/s refused, {} in flight, {} connections{}",
                short(head.requests_s),
                short(head.refused_s),
                head.in_flight,
                head.connections,
                match head.stuck {
                    0 => String::new(),
                    stuck => format!(", {stuck} STUCK"),
                },
            )),
        };
        vec![Line::styled(first, BOLD), second]
    }

    fn keys_line(&self, pages: usize) -> Line<'static> {
        let (page, sort) = (self.ui.page % pages.max(1) + 1, self.ui.sort.word());
        let pause = if self.ui.paused { "PAUSED" } else { "pause" };
        Line::styled(
            format!(
                "q quit  s sort: {sort}  n next page: {page} of {pages}  space {pause}  \
                 1-5 all cores routes planes gpu"
            ),
            TITLE,
        )
    }

    fn sections(&self, width: u16) -> Vec<Section> {
        let Some(sight) = self.sight else {
            return Vec::new();
        };
        let view = self.ui.view;
        let wanted = |of: View| view == of || view == View::All;
        let mut sections = Vec::new();
        if wanted(View::Cores) {
            sections.push(cores(&sight.cores));
        }
        if wanted(View::Routes) && !(sight.routes.is_empty() && view == View::All) {
            sections.push(routes(&sight.routes, width));
        }
        if wanted(View::Planes) && !(sight.planes.is_empty() && view == View::All) {
            sections.push(planes(&sight.planes));
        }
        if wanted(View::Gpu) && !(sight.pools.is_empty() && view == View::All) {
            sections.push(pools(&sight.pools));
        }
        sections
    }
}

/// Lines of each section: all that it wants if there is room; else each keeps a few, and the rest
/// goes line by line to the one that has the fewest, so that the longest does not take it all.
fn share(sections: &[Section], lines: usize) -> Vec<usize> {
    let wanted: Vec<usize> = sections.iter().map(|one| one.rows.len() + 1).collect();
    let mut shares: Vec<usize> = wanted.iter().map(|want| SECTION_MIN.min(*want)).collect();
    let mut left = lines;
    for share in &mut shares {
        *share = left.min(*share);
        left -= *share;
    }
    while left > 0 {
        let mut hungry: Vec<usize> = (0..shares.len())
            .filter(|place| shares[*place] < wanted[*place])
            .collect();
        if hungry.is_empty() {
            break;
        }
        hungry.sort_by_key(|place| shares[*place]);
        shares[hungry[0]] += 1;
        left -= 1;
    }
    shares
}

impl Section {
    fn pages(&self, lines: usize) -> usize {
        self.rows
            .len()
            .div_ceil(lines.saturating_sub(1).max(1))
            .max(1)
    }

    fn table(&self, lines: usize, page: usize) -> Table<'_> {
        let most = lines.saturating_sub(1);
        let first = page % self.pages(lines) * most.max(1);
        let shown = self.rows.iter().skip(first).take(most);
        let cell = |(text, (title, _)): (&String, &(&str, Constraint))| {
            let text = Text::raw(text.clone());
            // Names begin at the left, numbers end at the right.
            match title.ends_with(' ') {
                true => Cell::from(text),
                false => Cell::from(text.right_aligned()),
            }
        };
        let rows = shown.map(|(cells, style)| {
            let cells = cells.iter().zip(&self.head).map(cell);
            Row::new(cells.collect::<Vec<_>>()).style(*style)
        });
        let titles = self
            .head
            .iter()
            .map(|(title, _)| match title.ends_with(' ') {
                true => Cell::from(title.trim_end()),
                false => Cell::from(Text::raw(*title).right_aligned()),
            });
        let titles = Row::new(titles.collect::<Vec<_>>()).style(TITLE);
        let widths = self.head.iter().map(|(_, width)| *width);
        Table::new(rows, widths).header(titles).column_spacing(1)
    }
}

fn cores(rows: &[CoreRow]) -> Section {
    use Constraint::Length;
    let head = vec![
        ("CORE", Length(4)),
        ("CPU", Length(3)),
        ("RING ", Length(5)),
        ("GEAR ", Length(5)),
        ("REQ/S", Length(7)),
        ("P50", Length(6)),
        ("P99", Length(6)),
        ("CALLS", Length(6)),
        ("BUF LOW", Length(9)),
        ("FLIGHT", Length(6)),
        ("REF/S", Length(5)),
        ("LOCAL", Length(5)),
    ];
    let row = |row: &CoreRow| {
        let cells = vec![
            row.core.clone(),
            row.cpu.clone(),
            row.ring.clone(),
            row.gear.to_owned(),
            short(row.requests_s),
            row.hop_p50_s.map_or_else(none, time),
            row.hop_p99_s.map_or_else(none, time),
            row.calls.map_or_else(none, |calls| format!("{calls:.2}")),
            row.buffers
                .map_or_else(none, |(low, all)| format!("{low}/{all}")),
            row.in_flight.to_string(),
            short(row.refused_s),
            row.locality.map_or_else(none, |part| format!("{part:.2}")),
        ];
        let short_of_buffers = row.buffers.is_some_and(|(low, all)| low < all / 8);
        let is_bad = row.gear == "still" || row.refused_s > 0.0 || short_of_buffers;
        (cells, if is_bad { BAD } else { Style::new() })
    };
    Section {
        head,
        rows: rows.iter().map(row).collect(),
    }
}

/// Columns of a route beside its name.
const ROUTE_COLUMNS: [(&str, u16); 6] = [
    ("REQ/S", 7),
    ("LOAD", 7),
    ("BUSY", 6),
    ("ERRORS", 6),
    ("ERR/S", 5),
    ("STATE ", 16),
];

fn routes(rows: &[RouteRow], width: u16) -> Section {
    let columns = ROUTE_COLUMNS.iter();
    let taken: u16 = columns.clone().map(|(_, width)| width + 1).sum();
    let name = width.saturating_sub(taken).clamp(12, 60);
    let mut head = vec![("ROUTE, INSTANCE ", Constraint::Length(name))];
    head.extend(columns.map(|(title, width)| (*title, Constraint::Length(*width))));
    let mut out = Vec::new();
    for route in rows {
        let state = format!(
            "{}/{} {}",
            route.ready,
            route.instances.len() + route.left_out,
            if route.registered {
                policy(&route.policy)
            } else {
                "UNREGISTERED"
            },
        );
        let bad = !route.registered || route.ready == 0;
        let style = if bad { BOLD.patch(BAD) } else { BOLD };
        out.push((line(cut(&route.listen, name), &route.sum, state), style));
        for instance in &route.instances {
            let name = label(instance, name);
            let style = match instance.barrier {
                Some(_) => BAD,
                None => Style::new(),
            };
            out.push((line(name, &instance.figures, state_of(instance)), style));
        }
        if route.left_out > 0 {
            out.push((vec![format!("  and {} more", route.left_out)], DIM));
        }
    }
    Section { head, rows: out }
}

/// Id and address of an instance; the middle of a long id is left out before the address is cut.
fn label(instance: &InstanceRow, width: u16) -> String {
    let (id, address) = (&instance.id, &instance.address);
    let whole = format!("  {id} {address}");
    let ends = id.get(..4).zip(id.get(id.len().saturating_sub(4)..));
    match ends {
        Some((front, back)) if whole.chars().count() > width.into() && id.len() > 9 => {
            cut(&format!("  {front}…{back} {address}"), width)
        }
        _ => cut(&whole, width),
    }
}

fn line(name: String, figures: &Figures, state: String) -> Vec<String> {
    vec![
        name,
        short(figures.requests_s),
        short(figures.load),
        figures.busy.to_string(),
        short(figures.failed as f64),
        short(figures.failed_s),
        state,
    ]
}

fn state_of(instance: &InstanceRow) -> String {
    match &instance.barrier {
        None => "ready".to_owned(),
        Some((why, None)) => why.clone(),
        Some((why, Some(ms))) => format!("{why} {:.1}s", *ms as f64 / 1e3),
    }
}

/// A policy in few columns.
fn policy(policy: &str) -> &str {
    match policy {
        "power_of_two_choices" => "two_choices",
        other => other,
    }
}

fn planes(rows: &[(&'static str, String)]) -> Section {
    let row = |(name, state): &(&'static str, String)| {
        (vec![(*name).to_owned(), state.clone()], Style::new())
    };
    Section {
        head: vec![
            ("PLANE ", Constraint::Length(9)),
            ("STATE ", Constraint::Fill(1)),
        ],
        rows: rows.iter().map(row).collect(),
    }
}

fn pools(rows: &[PoolRow]) -> Section {
    let row = |pool: &PoolRow| {
        let cells = vec![
            cut(&pool.gpu, 17),
            cut(&pool.tag, 12),
            pool.state.clone(),
            pool.holder.clone(),
            pool.waiters.to_string(),
            pool.writers.to_string(),
            format!("{}B", short(pool.bytes as f64)),
        ];
        (cells, Style::new())
    };
    Section {
        head: vec![
            ("GPU ", Constraint::Length(17)),
            ("POOL ", Constraint::Length(12)),
            ("STATE ", Constraint::Length(16)),
            ("HOLDER ", Constraint::Length(11)),
            ("WAIT", Constraint::Length(4)),
            ("TO WRITE", Constraint::Length(8)),
            ("HELD", Constraint::Length(6)),
        ],
        rows: rows.iter().map(row).collect(),
    }
}

fn none() -> String {
    "-".to_owned()
}

/// The front of a text that is too long, with a mark.
fn cut(text: &str, width: u16) -> String {
    let width = usize::from(width);
    match text.chars().count() > width {
        true => {
            let front: String = text.chars().take(width.saturating_sub(1)).collect();
            format!("{front}…")
        }
        false => text.to_owned(),
    }
}

/// A number in five columns.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        v if v < 10.0 && v.fract() != 0.0 => format!("{v:.1}"),
        v if v < 99_999.5 => format!("{v:.0}"),
        v if v < 999_500.0 => format!("{:.0}k", v / 1e3),
        v if v < 999.5e6 => format!("{:.1}M", v / 1e6),
        v if v < 999.5e9 => format!("{:.1}G", v / 1e9),
        v => format!("{:.1}T", v / 1e12),
    }
}

/// Seconds in six columns.
fn time(seconds: f64) -> String {
    match seconds * 1e6 {
        us if us < 99.95 => format!("{us:.1}us"),
        us if us < 9_999.5 => format!("{us:.0}us"),
        us if us < 999_950.0 => format!("{:.1}ms", us / 1e3),
        us => format!("{:.1}s", us / 1e6),
    }
}

fn uptime(uptime: Duration) -> String {
    let seconds = uptime.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests;
