//! The terminal: samples come from a thread of their own, so that keys are heard while a process
//! does not answer.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::{DefaultTerminal, try_init, try_restore};

use super::draw::{Frame, Ui, View};
use super::scrape::Scrape;
use super::sight::{Sample, Sight};
use crate::overview::OVERVIEW;
use crate::status_client;

/// How long a key may wait for what a sample brings.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Asks a process once. `origin` is what the times of samples count from.
///
/// # Errors
/// Nobody answers, or not with metrics: a sentence.
pub fn fetch(address: &str, origin: Instant) -> Result<Sample, String> {
    let get = |path: &str| {
        let answer = status_client::get(address, path);
        answer.map_err(|error| format!("{address} does not answer: {error}"))
    };
    let (status, metrics) = get("/metrics")?;
    if status != 200 {
        return Err(format!("{address} has no metrics: it answers {status}"));
    }
    let at = origin.elapsed();
    let (status, overview) = get(OVERVIEW)?;
    // Who routes nothing has no such page.
    let overview = match status {
        200 => Some(serde_json::from_slice(&overview).map_err(|error| {
            format!("{address} says something else; is it of another version? {error}")
        })?),
        _ => None,
    };
    Ok(Sample {
        at,
        metrics: Scrape::parse(&String::from_utf8_lossy(&metrics)),
        overview,
    })
}

/// One page as text, of what happens in `interval`.
///
/// # Errors
/// As [`fetch`].
pub fn once(address: &str, interval: Duration, ui: Ui, width: u16) -> Result<String, String> {
    let origin = Instant::now();
    let before = fetch(address, origin)?;
    thread::sleep(interval);
    let now = fetch(address, origin)?;
    let sight = Sight::of(Some(&before), &now, ui.sort);
    let frame = Frame {
        sight: Some(&sight),
        address,
        trouble: None,
        ui,
        keys: false,
    };
    Ok(frame.text(width))
}

/// Takes the terminal until the user has seen enough.
///
/// # Errors
/// The terminal cannot be used.
pub fn live(address: &str, interval: Duration, ui: Ui) -> io::Result<()> {
    let (samples, coming) = channel();
    let (stop, stopped) = channel();
    let whom = address.to_owned();
    thread::spawn(move || sample(&whom, interval, &samples, &stopped));
    let mut terminal = try_init()?;
    let mut screen = Screen {
        address: address.to_owned(),
        ui,
        before: None,
        now: None,
        trouble: None,
    };
    let outcome = screen.run(&mut terminal, &coming);
    drop(stop);
    let restored = try_restore();
    outcome.and(restored)
}

type Said = Result<Sample, String>;

/// Asks again and again, until nobody wants it.
fn sample(address: &str, interval: Duration, samples: &Sender<Said>, stopped: &Receiver<()>) {
    let origin = Instant::now();
    loop {
        let began = Instant::now();
        if samples.send(fetch(address, origin)).is_err() {
            return;
        }
        let pause = interval.saturating_sub(began.elapsed());
        if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

struct Screen {
    address: String,
    ui: Ui,
    before: Option<Sample>,
    now: Option<Sample>,
    trouble: Option<String>,
}

impl Screen {
    fn run(&mut self, terminal: &mut DefaultTerminal, coming: &Receiver<Said>) -> io::Result<()> {
        let mut news = true;
        loop {
            for said in coming.try_iter() {
                news |= self.take(said);
            }
            if news {
                self.draw(terminal)?;
            }
            news = false;
            if event::poll(LOOK_EVERY)? {
                news = true;
                if let Event::Key(key) = event::read()?
                    && key.kind != KeyEventKind::Release
                    && self.obey(key.code, key.modifiers)
                {
                    return Ok(());
                }
            }
        }
    }

    /// Answers whether there is something new to be seen.
    fn take(&mut self, said: Said) -> bool {
        if self.ui.paused {
            return false;
        }
        match said {
            Ok(sample) => {
                self.before = self.now.replace(sample);
                self.trouble = None;
            }
            Err(why) => self.trouble = Some(why),
        }
        true
    }

    fn draw(&self, terminal: &mut DefaultTerminal) -> io::Result<()> {
        let now = self.now.as_ref();
        let sight = now.map(|now| Sight::of(self.before.as_ref(), now, self.ui.sort));
        let frame = Frame {
            sight: sight.as_ref(),
            address: &self.address,
            trouble: self.trouble.as_deref(),
            ui: self.ui,
            keys: true,
        };
        terminal.draw(|on| frame.render(on.area(), on.buffer_mut()))?;
        Ok(())
    }

    /// Answers whether the user has seen enough.
    fn obey(&mut self, key: KeyCode, with: KeyModifiers) -> bool {
        let ui = &mut self.ui;
        match key {
            KeyCode::Char('c') if with.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('s') => ui.sort = ui.sort.next(),
            KeyCode::Char('n') | KeyCode::PageDown => ui.page = ui.page.wrapping_add(1),
            KeyCode::Char('p') | KeyCode::PageUp => ui.page = ui.page.saturating_sub(1),
            KeyCode::Home => ui.page = 0,
            KeyCode::Char(' ') => ui.paused = !ui.paused,
            KeyCode::Tab => (ui.view, ui.page) = (ui.view.next(), 0),
            KeyCode::Char(digit @ '1'..='5') => {
                let place = digit as usize - '1' as usize;
                (ui.view, ui.page) = (View::ALL[place], 0);
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::Sort;

    #[test]
    fn keys_do_what_the_last_line_says() {
        let mut screen = Screen {
            address: "x:1".into(),
            ui: Ui::default(),
            before: None,
            now: None,
            trouble: None,
        };
        let mut press = |key: KeyCode| {
            let quits = screen.obey(key, KeyModifiers::NONE);
            (quits, screen.ui)
        };
        assert_eq!(press(KeyCode::Char('s')).1.sort, Sort::Requests);
        assert_eq!(press(KeyCode::Char('n')).1.page, 1);
        assert_eq!(press(KeyCode::Char('p')).1.page, 0);
        assert_eq!(press(KeyCode::Char('p')).1.page, 0);
        press(KeyCode::PageDown);
        let (_, ui) = press(KeyCode::Char('3'));
        assert_eq!((ui.view, ui.page), (View::Routes, 0));
        assert_eq!(press(KeyCode::Tab).1.view, View::Planes);
        assert!(press(KeyCode::Char(' ')).1.paused);
        assert!(!press(KeyCode::Char(' ')).1.paused);
        assert!(press(KeyCode::Char('q')).0 && press(KeyCode::Esc).0);
        assert!(!press(KeyCode::Char('c')).0);
        assert!(screen.obey(KeyCode::Char('c'), KeyModifiers::CONTROL));
    }

    #[test]
    fn a_paused_screen_takes_nothing_new() {
        let mut screen = Screen {
            address: "x:1".into(),
            ui: Ui::default(),
            before: None,
            now: None,
            trouble: None,
        };
        assert!(screen.take(Ok(Sample::default())));
        assert!(screen.take(Err("gone".into())) && screen.trouble.is_some());
        screen.ui.paused = true;
        assert!(!screen.take(Ok(Sample::default())) && screen.trouble.is_some());
        screen.ui.paused = false;
        assert!(screen.take(Ok(Sample::default())) && screen.trouble.is_none());
        assert!(screen.before.is_some());
    }
}
