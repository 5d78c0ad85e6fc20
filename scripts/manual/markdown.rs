//! Chapters of the reference, from Markdown to a man page's source.

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// The chapters of `markdown` that `is_wanted` says, by their headings.
pub fn chapters(markdown: &str, is_wanted: impl Fn(&str) -> bool) -> Roff {
    let mut page = Page::default();
    let mut chapter = Vec::new();
    for event in Parser::new_ext(markdown, Options::ENABLE_TABLES) {
        if matches!(event, Event::Start(Tag::Heading { .. })) {
            page.add(std::mem::take(&mut chapter), &is_wanted);
        }
        chapter.push(event);
    }
    page.add(chapter, &is_wanted);
    page.roff
}

/// What has been written so far.
#[derive(Default)]
struct Page {
    roff: Roff,
    line: Vec<Inline>,
    is_bold: bool,
    is_preformatted: bool,
    /// A list's entry has begun, and its first paragraph begins no other.
    begins_entry: bool,
    /// Where a link leads, if that is not the page itself.
    link: Option<String>,
    table: Table,
}

#[derive(Default)]
struct Table {
    headings: Vec<String>,
    cells: Vec<Vec<Inline>>,
}

impl Page {
    fn add(&mut self, chapter: Vec<Event<'_>>, is_wanted: &impl Fn(&str) -> bool) {
        let heading = match chapter.as_slice() {
            [
                Event::Start(Tag::Heading { level, .. }),
                Event::Text(text),
                ..,
            ] => Some(text).filter(|_| *level != HeadingLevel::H1),
            _ => None,
        };
        if heading.is_some_and(|heading| is_wanted(heading)) {
            for event in chapter {
                self.take(event);
            }
        }
    }

    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Start(tag) => self.start(tag),
            Event::End(tag) => self.end(tag),
            Event::Text(text) if self.is_preformatted => {
                for line in text.lines() {
                    self.roff.text([roman(line)]);
                }
            }
            Event::Text(text) if self.is_bold => self.line.push(bold(text.as_ref())),
            Event::Text(text) => self.line.push(roman(text.as_ref())),
            Event::Code(code) => self.line.push(bold(code.as_ref())),
            Event::SoftBreak | Event::HardBreak => self.line.push(roman(" ")),
            _ => {}
        }
    }

    fn start(&mut self, tag: Tag<'_>) {
        match tag {
            Tag::Strong => self.is_bold = true,
            Tag::Link { dest_url, .. } => {
                self.link = Some(dest_url.to_string()).filter(|url| url.starts_with("http"));
            }
            Tag::Paragraph if !std::mem::take(&mut self.begins_entry) => {
                self.control("PP", &[]);
            }
            Tag::Item => {
                self.end_line();
                self.control("IP", &["\\(bu", "2"]);
                self.begins_entry = true;
            }
            Tag::CodeBlock(_) => {
                self.control("PP", &[]);
                self.control("nf", &[]);
                self.control("RS", &["4"]);
                self.is_preformatted = true;
            }
            Tag::Table(_) => self.table = Table::default(),
            Tag::TableRow => self.table.cells.clear(),
            _ => {}
        }
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Heading(_) => {
                let heading = text_of(&std::mem::take(&mut self.line)).to_uppercase();
                self.control("SH", &[&heading]);
            }
            TagEnd::Strong => self.is_bold = false,
            TagEnd::Link => {
                if let Some(url) = self.link.take() {
                    self.line.push(roman(format!(" <{url}>")));
                }
            }
            TagEnd::Paragraph => self.end_line(),
            TagEnd::Item => {
                self.end_line();
                self.begins_entry = false;
            }
            TagEnd::CodeBlock => {
                self.control("RE", &[]);
                self.control("fi", &[]);
                self.is_preformatted = false;
            }
            TagEnd::TableCell => self.table.cells.push(std::mem::take(&mut self.line)),
            TagEnd::TableHead => {
                self.table.headings = self.table.cells.iter().map(|cell| text_of(cell)).collect();
            }
            TagEnd::TableRow => self.end_row(),
            _ => {}
        }
    }

    /// A row is an entry of its own, named by its first cell; or, if that is empty, it goes on with the one before.
    fn end_row(&mut self) {
        let Table { headings, cells } = std::mem::take(&mut self.table);
        let mut columns = headings.iter().zip(&cells);
        match columns.next() {
            Some((_, name)) if !name.is_empty() => {
                self.control("TP", &[]);
                self.roff.text(name.clone());
            }
            _ => self.control("br", &[]),
        }
        let columns = columns.filter(|(_, cell)| !cell.is_empty());
        for (at, (heading, cell)) in columns.enumerate() {
            if at > 0 {
                self.control("br", &[]);
            }
            self.roff.text(named(heading, cell));
        }
        self.table.headings = headings;
    }

    fn control(&mut self, name: &str, arguments: &[&str]) {
        self.roff.control(name, arguments.iter().copied());
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if !line.is_empty() {
            self.roff.text(line);
        }
    }
}

/// A cell behind the name of its column, which may have none.
fn named(heading: &str, cell: &[Inline]) -> Vec<Inline> {
    let mut line = Vec::new();
    if heading.ends_with('=') {
        line.push(italic(heading));
    } else if !heading.is_empty() {
        line.extend([italic(heading), roman(": ")]);
    }
    line.extend_from_slice(cell);
    line
}

fn text_of(line: &[Inline]) -> String {
    let texts = line.iter().map(|inline| match inline {
        Inline::Roman(text) | Inline::Bold(text) | Inline::Italic(text) => text.as_str(),
        Inline::LineBreak => " ",
    });
    texts.collect()
}
