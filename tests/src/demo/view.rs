//! The live view: a screen with a terminal, plain lines without one.

use std::{
    io::{self, IsTerminal as _},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::{
    DefaultTerminal, Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize as _},
    text::{Line, Span, Text},
    widgets::{Cell, Paragraph, Row as TableRow, Table},
};

use super::{
    acts::{self, ACTS},
    scene::{Row, Scene, clock},
};
use crate::cleanup;

/// Time between two blocks of plain lines.
const BLOCK: Duration = Duration::from_secs(2);

/// The terminal while it is ours. A signal takes it away, from its own thread.
static TERMINAL: Mutex<Option<DefaultTerminal>> = Mutex::new(None);

/// Shows scenes. Dropping it gives the terminal back.
#[derive(Debug)]
pub struct View {
    screen: bool,
    next_block: Duration,
    lines_said: usize,
}

impl View {
    /// Takes the terminal, if standard output is one and `plain` does not forbid it.
    ///
    /// # Errors
    /// If the terminal refuses.
    pub fn open(plain: bool) -> Result<Self> {
        let screen = !plain && io::stdout().is_terminal();
        if screen {
            // Restores the terminal before a panic's message, too.
            let terminal = ratatui::try_init().context("the terminal cannot show the view; try --plain")?;
            *TERMINAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(terminal);
            cleanup::at_signal(give_back);
            if io::stdin().is_terminal() {
                thread::spawn(watch_keys);
            }
        }
        Ok(Self { screen, next_block: Duration::ZERO, lines_said: 0 })
    }

    /// Shows a scene; `said` is how many lines have been said from the beginning on.
    ///
    /// # Errors
    /// If the terminal is gone.
    pub fn show(&mut self, scene: &Scene<'_>, said: usize) -> Result<()> {
        if self.screen {
            let mut terminal = TERMINAL.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(terminal) = terminal.as_mut() {
                terminal.draw(|frame| draw(frame, scene))?;
            }
            return Ok(());
        }
        let new = said.saturating_sub(self.lines_said).min(scene.said.len());
        self.lines_said = said;
        for (at, text) in scene.said.iter().skip(scene.said.len() - new) {
            println!("{}  {text}", clock(*at, true));
        }
        if scene.elapsed >= self.next_block {
            self.next_block = scene.elapsed + BLOCK;
            print!("{}", block(scene));
        }
        Ok(())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if self.screen {
            give_back();
        }
    }
}

fn give_back() {
    let mut terminal = TERMINAL.lock().unwrap_or_else(PoisonError::into_inner);
    if terminal.take().is_some() {
        ratatui::restore();
    }
}

/// The terminal makes no signals of keys while it is ours: here Ctrl-C becomes one again.
fn watch_keys() {
    while TERMINAL.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
        let Ok(ready) = event::poll(Duration::from_millis(100)) else { return };
        if !ready {
            continue;
        }
        let Ok(Event::Key(key)) = event::read() else { continue };
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if key.code == KeyCode::Char('q') || (control && key.code == KeyCode::Char('c')) {
            // SAFETY: takes a number; the handler is that of the bed, which cleans up.
            unsafe { libc::kill(libc::getpid(), libc::SIGINT) };
        }
    }
}

/// One block of plain lines.
fn block(scene: &Scene<'_>) -> String {
    let (name, _) = scene.title();
    let mut text =
        format!("--- {} {name} ---\n{}\n", clock(scene.elapsed, false), Row::line(&Row::HEAD.map(str::to_owned)));
    for row in scene.rows() {
        text.push_str(&Row::line(&row.cells()));
        text.push('\n');
    }
    let musts = scene.musts().map(|must| format!("{}: {}", must.what, must.count));
    text.push_str(&format!("must be 0: {}\n", musts.join("; ")));
    text
}

fn draw(frame: &mut Frame<'_>, scene: &Scene<'_>) {
    let area = frame.area();
    let area = Rect { x: area.x + 1, width: area.width.saturating_sub(2), ..area };
    let servers = scene.rows().len() as u16;
    let [head, _, table, _, musts, _, said] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(1),
        Constraint::Length(servers + 1),
        Constraint::Length(1),
        Constraint::Length(4),
        Constraint::Length(1),
        Constraint::Min(0),
    ])
    .areas(area);
    draw_head(frame, scene, head);
    draw_table(frame, scene, table);
    draw_musts(frame, scene, musts);
    draw_said(frame, scene, said);
}

fn draw_head(frame: &mut Frame<'_>, scene: &Scene<'_>, area: Rect) {
    let [first, second, third] = Layout::vertical([Constraint::Length(1); 3]).areas(area);
    let times = format!("{} of {}", clock(scene.elapsed, false), clock(acts::length(), false));
    frame.render_widget(Line::from(vec!["necp".bold().cyan(), " a farm that steers itself".into()]), first);
    frame.render_widget(Paragraph::new(times).alignment(Alignment::Right), first);
    frame.render_widget(Line::from(scene.title().1).bold(), second);
    let playing = scene.act.unwrap_or(ACTS.len());
    let mut line = Vec::new();
    for (at, act) in ACTS.iter().enumerate() {
        line.push(match at.cmp(&playing) {
            std::cmp::Ordering::Less => Span::styled(format!("✓ {}", act.name), Style::new().green()),
            std::cmp::Ordering::Equal => Span::styled(format!("▶ {}", act.name), Style::new().yellow().bold()),
            std::cmp::Ordering::Greater => Span::styled(format!("· {}", act.name), Style::new().dark_gray()),
        });
        line.push("  ".into());
    }
    frame.render_widget(Line::from(line), third);
}

fn draw_table(frame: &mut Frame<'_>, scene: &Scene<'_>, area: Rect) {
    let own: u16 = Row::WIDTHS.iter().sum::<u16>() + Row::WIDTHS.len() as u16;
    let bar = area.width.saturating_sub(own).min(40);
    let rows = scene.rows();
    let total = rows.last().map_or(0, |all| all.new).max(1);
    let lines = rows.iter().map(|row| {
        let all = row.name == "all";
        let style = if all { Style::new().dark_gray() } else { state_style(&row.state) };
        let cells = row.cells().into_iter().enumerate().map(|(at, text)| {
            let failed = at == 11 && row.failed > 0;
            let style = if failed {
                Style::new().yellow()
            } else if at < 2 {
                style
            } else {
                Style::new()
            };
            let alignment = if at < 2 { Alignment::Left } else { Alignment::Right };
            Cell::from(Text::from(text).alignment(alignment)).style(style)
        });
        let length = usize::from(bar) * row.new / total;
        let share = if all || bar < 6 { String::new() } else { "▇".repeat(length.min(bar.into())) };
        TableRow::new(cells.chain([Cell::from(share).style(Style::new().cyan())]))
    });
    let head = Row::HEAD.iter().enumerate().map(|(at, name)| {
        Cell::from(Text::from(*name).alignment(if at < 2 { Alignment::Left } else { Alignment::Right }))
    });
    let share = if bar < 24 { "" } else { "SHARE OF NEW CONNECTIONS" };
    let head = TableRow::new(head.chain([Cell::from(share)])).style(Style::new().dark_gray());
    let widths = Row::WIDTHS.iter().copied().chain([bar]).map(Constraint::Length);
    frame.render_widget(Table::new(lines, widths).header(head).column_spacing(1), area);
}

fn state_style(state: &str) -> Style {
    let color = match state {
        "up" => Color::Green,
        "draining" | "stopped" | "adopted" | "kept" => Color::Yellow,
        "" => Color::DarkGray,
        _ => Color::Red,
    };
    Style::new().fg(color).add_modifier(Modifier::BOLD)
}

fn draw_musts(frame: &mut Frame<'_>, scene: &Scene<'_>, area: Rect) {
    let (answered, failed) = (scene.record.answered(), scene.record.failed());
    let mut lines = vec![Line::from(vec![
        "requests  ".dark_gray(),
        format!("{answered} answered").into(),
        format!("  {failed} failed").into(),
    ])];
    for must in scene.musts() {
        let style = if must.count == 0 { Style::new().green() } else { Style::new().red().bold() };
        lines.push(Line::from(vec![
            "must be 0 ".dark_gray(),
            Span::styled(format!("{}: {}", must.what, must.count), style),
        ]));
    }
    if let Some(allowed) = scene.allowed() {
        lines.push(Line::from(allowed).dark_gray());
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn draw_said(frame: &mut Frame<'_>, scene: &Scene<'_>, area: Rect) {
    let skipped = scene.said.len().saturating_sub(area.height.into());
    let line = |(at, text): &(Duration, String)| {
        Line::from(vec![format!("{}  ", clock(*at, true)).dark_gray(), text.clone().into()])
    };
    frame.render_widget(Paragraph::new(scene.said.iter().skip(skipped).map(line).collect::<Vec<_>>()), area);
}
