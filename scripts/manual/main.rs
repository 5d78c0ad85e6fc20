//! The man pages and the shells' completions, made from what the program itself parses its options by.
//!
//!     cargo run --example manual DIRECTORY
//!
//! writes `tunneld.8`, `tunneld-connect.1`, `tunneld.bash`, `_tunneld` (zsh) and `tunneld.fish` into DIRECTORY.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod markdown;

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use tunneld::exposed::{client_command, daemon_command};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [directory] = arguments.as_slice() else {
        eprintln!("manual: name one directory to write to");
        return ExitCode::from(2);
    };
    match write_all(Path::new(directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("manual: cannot write to {}: {error}", directory.display());
            ExitCode::FAILURE
        }
    }
}

fn write_all(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for page in PAGES {
        fs::write(directory.join(page.file()), page.render()?)?;
    }
    for (shell, file) in SHELLS {
        fs::write(directory.join(file), completions(shell)?)?;
    }
    Ok(())
}

const SHELLS: [(Shell, &str); 3] = [
    (Shell::Bash, "tunneld.bash"),
    (Shell::Zsh, "_tunneld"),
    (Shell::Fish, "tunneld.fish"),
];

fn completions(shell: Shell) -> io::Result<String> {
    // To clap the client is a program of its own, to a shell it is a subcommand.
    let mut command = with_plain_names(daemon_command())
        .disable_help_subcommand(true)
        .subcommand(with_plain_names(client_command()).name("connect"));
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "tunneld", &mut script);
    let script = String::from_utf8(script).map_err(io::Error::other)?;
    Ok(script.replace(FISH_GIVES_UP, FISH_GOES_ON))
}

/// How fish's script finds out whether a subcommand has come: it fails where an option still lacks its value, and so
/// that value would never be completed. No subcommand has come by then.
const FISH_GIVES_UP: &str = "-- $cmd 2>/dev/null\n    or return\n";
const FISH_GOES_ON: &str = "-- $cmd 2>/dev/null\n    or return 0\n";

/// clap_complete puts the names of values between the quotes and colons of zsh's scripts as they are, and zsh takes a
/// colon in one for its own.
fn with_plain_names(command: Command) -> Command {
    command.mut_args(|option| {
        let mut names = option.get_value_names().unwrap_or_default().iter();
        match names.all(|name| is_plain(name)) {
            true => option,
            false => option.value_name("VALUE"),
        }
    })
}

fn is_plain(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

struct Page {
    name: &'static str,
    section: &'static str,
    manual: &'static str,
    see_also: &'static str,
    command: fn() -> Command,
    /// What the reference has to say on it.
    chapters: &'static [&'static str],
}

const REFERENCE: &str = include_str!("../../src/reference.md");

const PAGES: [Page; 2] = [
    Page {
        name: "tunneld",
        section: "8",
        manual: "System Administration",
        see_also: "tunneld-connect(1), systemd.exec(5); what it costs, and how it compares with others: \
                   /usr/share/doc/tunneld/reference.md",
        command: daemon_command,
        chapters: &[
            "Answers",
            "Ends",
            "Keepalive",
            "CONNECT-TCP",
            "Targets",
            "The daemon's options",
            "Clients",
            "Metrics",
            "Log",
            "Limits",
            "Memory",
            "Operating",
            "In a container",
        ],
    },
    Page {
        name: "tunneld-connect",
        section: "1",
        manual: "User Commands",
        see_also: "tunneld(8) for how a tunnel ends, keepalive and CONNECT-TCP; ssh(1), curl(1)",
        command: client_command,
        chapters: &["The client's options"],
    },
];

impl Page {
    fn file(&self) -> String {
        format!("{}.{}", self.name, self.section)
    }

    fn render(&self) -> io::Result<Vec<u8>> {
        let mut command = (self.command)();
        let usage = command.render_usage().to_string();
        let usage = usage.trim_start_matches("Usage: ").to_owned();
        let about = command.get_long_about().map(ToString::to_string);
        let after_help = command.get_after_help().map(ToString::to_string);
        let man = Man::new(command.display_name(self.name).override_usage(usage))
            .title(self.name.to_uppercase())
            .section(self.section)
            .source(concat!("tunneld ", env!("CARGO_PKG_VERSION")))
            .manual(self.manual);
        let mut page = Vec::new();
        man.render_title(&mut page)?;
        man.render_name_section(&mut page)?;
        man.render_synopsis_section(&mut page)?;
        let mut roff = Roff::new();
        description(&mut roff, &about.unwrap_or_default());
        roff.to_writer(&mut page)?;
        man.render_options_section(&mut page)?;
        let mut roff = Roff::new();
        sections(&mut roff, &after_help.unwrap_or_default());
        roff.to_writer(&mut page)?;
        markdown::chapters(REFERENCE, |heading| self.chapters.contains(&heading))
            .to_writer(&mut page)?;
        let mut roff = Roff::new();
        roff.control("SH", ["SEE ALSO"]);
        roff.text([roman(self.see_also)]);
        roff.to_writer(&mut page)?;
        Ok(page)
    }
}

/// What `--help` says before the options. Commands are indented, and stay as they are.
fn description(roff: &mut Roff, about: &str) {
    roff.control("SH", ["DESCRIPTION"]);
    for paragraph in about.split("\n\n") {
        let is_command = paragraph.starts_with(' ');
        roff.control("PP", []);
        if is_command {
            roff.control("nf", []);
        }
        for line in paragraph.lines() {
            roff.text([roman(line)]);
        }
        if is_command {
            roff.control("fi", []);
        }
    }
}

/// What `--help` says after the options: a heading, and below it entries that are indented by two, a name and two
/// spaces before the text of each, or sentences; what is indented more goes on with the line before.
fn sections(roff: &mut Roff, after_help: &str) {
    for line in after_help.lines().filter(|line| !line.is_empty()) {
        let entry = line.trim_start();
        match (line.len() - entry.len(), entry.split_once("  ")) {
            (0, _) => {
                let heading = match entry {
                    "Exit codes:" => "EXIT STATUS".into(),
                    other => other.trim_end_matches(':').to_uppercase(),
                };
                roff.control("SH", [heading.as_str()]);
            }
            (2, Some((name, text))) => {
                roff.control("TP", []);
                roff.text([bold(name)]);
                roff.text([roman(text.trim_start())]);
            }
            (2, None) if !entry.ends_with('.') => {
                roff.control("TP", []);
                roff.text([bold(entry)]);
            }
            _ => {
                roff.text([roman(entry)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// `-n` and `--no-close`, of each option.
    fn flags(command: &Command) -> BTreeSet<String> {
        let options = command.get_arguments();
        options
            .flat_map(|option| {
                let short = option.get_short().map(|short| format!("-{short}"));
                let long = option.get_long().map(|long| format!("--{long}"));
                short.into_iter().chain(long)
            })
            .collect()
    }

    fn built(page: &Page) -> Command {
        let mut command = (page.command)();
        command.build();
        command
    }

    /// A page's source without fonts, but for the italics that values have, and escapes.
    fn plain(page: &Page) -> String {
        let text = String::from_utf8(page.render().unwrap()).unwrap();
        [("\\-", "-"), ("\\fB", ""), ("\\fR", ""), ("\\*(Aq", "'")]
            .iter()
            .fold(text, |text, (escape, meaning)| {
                text.replace(escape, meaning)
            })
    }

    /// The words that are options.
    fn flags_in(text: &str) -> BTreeSet<String> {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
        let flags = words.filter(|word| word.starts_with('-') && word.len() > 1);
        flags.map(str::to_owned).collect()
    }

    /// What stands in the first two columns of the options' table under that heading of the reference.
    fn table(heading: &str) -> Vec<(&'static str, &'static str)> {
        let mut chapters = chapters().into_iter();
        let (_, chapter) = chapters.find(|(name, _)| *name == heading).unwrap();
        let table = chapter.split("| exit code |").next().unwrap();
        let rows = table.lines().filter_map(|line| line.strip_prefix("| "));
        rows.skip(2)
            .map(|row| {
                let mut cells = row.split(" | ");
                (cells.next().unwrap(), cells.next().unwrap())
            })
            .collect()
    }

    fn tables() -> [(Command, Vec<(&'static str, &'static str)>); 2] {
        [
            (built(&PAGES[0]), table("The daemon's options")),
            (built(&PAGES[1]), table("The client's options")),
        ]
    }

    #[test]
    fn a_man_page_has_the_options_of_its_program_and_their_variables() {
        for page in &PAGES {
            let text = plain(page);
            let tagged = text.split("\n.TP\n").skip(1);
            let heads: Vec<_> = tagged.filter_map(|entry| entry.lines().next()).collect();
            let heads: Vec<_> = heads
                .into_iter()
                .filter(|head| head.starts_with('-'))
                .collect();
            let heads = heads.iter().map(|head| head.split("\\fI").next().unwrap());
            let in_page = heads.flat_map(flags_in).collect::<BTreeSet<_>>();
            let command = built(page);
            assert_eq!(in_page, flags(&command), "{}", page.file());
            for option in command.get_arguments() {
                if let Some(variable) = option.get_env() {
                    assert!(text.contains(variable.to_str().unwrap()), "{variable:?}");
                }
            }
            for heading in [
                "NAME",
                "SYNOPSIS",
                "OPTIONS",
                "ENVIRONMENT",
                "EXIT STATUS",
                "SEE ALSO",
            ] {
                assert!(
                    text.contains(&format!("\n.SH {heading}\n"))
                        || text.contains(&format!("\n.SH \"{heading}\"\n")),
                    "{heading} in {text}"
                );
            }
            assert!(text.contains(concat!("tunneld ", env!("CARGO_PKG_VERSION"))));
        }
    }

    /// Of the reference, with what they say.
    fn chapters() -> Vec<(&'static str, &'static str)> {
        let chapters = REFERENCE.split("\n## ").skip(1);
        chapters
            .map(|chapter| chapter.split_once('\n').unwrap())
            .collect()
    }

    #[test]
    fn every_chapter_of_the_reference_is_in_a_man_page_but_what_no_user_of_a_package_asks() {
        let others = [
            "How it works",
            "What it costs",
            "What it adds to an image",
            "Other people's suites",
            "And the others",
        ];
        let in_pages = PAGES.iter().flat_map(|page| page.chapters);
        let named: Vec<_> = in_pages.chain(&others).copied().collect();
        let there: Vec<_> = chapters().into_iter().map(|(heading, _)| heading).collect();
        let sorted = |headings: &[_]| headings.iter().copied().collect::<BTreeSet<&str>>();
        assert_eq!(sorted(&named), sorted(&there));
        assert_eq!(named.len(), there.len());
    }

    /// Markdown without what only leads through a page, or names a language.
    fn shown(block: &str) -> String {
        let mut links = block.split("](#");
        let mut shown = links.next().unwrap().to_owned();
        for link in links {
            shown.push_str(link.split_once(')').unwrap().1);
        }
        ["```sh", "```yaml", "```text"]
            .iter()
            .fold(shown, |shown, fence| shown.replace(fence, ""))
    }

    /// The words of a text, with a space before and behind each.
    fn words(text: &str) -> String {
        let words = text.split(|c: char| !c.is_alphanumeric());
        let words = words.filter(|word| !word.is_empty());
        words.fold(" ".to_owned(), |words, word| words + word + " ")
    }

    /// What a page has in one piece: the cells of tables, and other than those the paragraphs and the entries of lists.
    fn pieces(chapter: &str) -> Vec<&str> {
        let blocks = chapter.split("\n\n");
        blocks
            .flat_map(|block| match block.trim_start().strip_prefix("| ") {
                Some(table) => {
                    let rows = table.lines().skip(1);
                    rows.flat_map(|row| row.split(" | ")).collect::<Vec<_>>()
                }
                None => block.split("\n- ").collect(),
            })
            .collect()
    }

    #[test]
    fn a_man_page_has_every_word_of_its_chapters_in_their_order() {
        for page in &PAGES {
            let text = plain(page).replace("\\fI", "");
            let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('.')).collect();
            let in_page = words(&lines.join("\n"));
            for (heading, chapter) in chapters() {
                if page.chapters.contains(&heading) {
                    for piece in pieces(chapter) {
                        let has_it = in_page.contains(&words(&shown(piece)));
                        assert!(has_it, "{}: {heading}: {piece}", page.file());
                    }
                }
            }
            assert!(!text.contains("(#"), "a link to a chapter");
        }
    }

    #[test]
    fn every_shell_completes_every_option() {
        for (shell, _) in SHELLS {
            let script = completions(shell).unwrap();
            for option in PAGES.iter().flat_map(|page| flags(&built(page))) {
                let written = match (shell, option.strip_prefix("--")) {
                    (Shell::Fish, Some(long)) => format!("-l {long}"),
                    (Shell::Fish, None) => format!("-s {}", option.trim_start_matches('-')),
                    _ => option,
                };
                assert!(script.contains(&written), "{shell}: {written}");
            }
        }
    }

    /// Where a line is too long, clap goes on at the left edge.
    #[test]
    fn what_is_indented_in_the_help_fits_a_terminal() {
        for page in &PAGES {
            let command = (page.command)();
            let texts = [command.get_long_about(), command.get_after_help()];
            let texts = texts.map(|text| text.unwrap().to_string());
            for line in texts.iter().flat_map(|text| text.lines()) {
                assert!(!line.starts_with(' ') || line.len() <= 80, "{line}");
            }
        }
    }

    #[test]
    fn what_completions_call_a_value_is_a_word() {
        for page in &PAGES {
            let command = with_plain_names((page.command)());
            for option in command.get_arguments() {
                let names = option.get_value_names().unwrap_or_default();
                assert!(names.iter().all(|name| is_plain(name)), "{names:?}");
            }
        }
    }

    #[test]
    fn every_shell_offers_the_values_of_an_option_that_has_few() {
        for (shell, _) in SHELLS {
            let script = completions(shell).unwrap();
            let between = match shell {
                Shell::Fish => "\\t''\n",
                _ => " ",
            };
            for values in [["text", "json"], ["websocket", "connect-tcp"]] {
                let values = values.join(between);
                assert!(script.contains(&values), "{shell}: {values}");
            }
        }
    }

    #[test]
    fn the_tables_of_the_reference_have_every_option() {
        for (command, rows) in tables() {
            let mut in_table = BTreeSet::new();
            for (names, _) in rows {
                in_table.append(&mut flags_in(names));
            }
            let everywhere = ["-h", "--help", "-V", "--version"].map(str::to_owned);
            in_table.extend(everywhere);
            assert_eq!(in_table, flags(&command), "{}", command.get_name());
        }
    }

    #[test]
    fn the_tables_of_the_reference_have_every_default() {
        for (command, rows) in tables() {
            for option in command.get_arguments() {
                let (Some(long), [default]) = (option.get_long(), option.get_default_values())
                else {
                    continue;
                };
                let default = default.to_str().unwrap();
                if option.get_action().takes_values() {
                    let in_table = default_in(&rows, &format!("`--{long}`"));
                    assert_eq!(in_table, format!("`{default}`"), "--{long}");
                }
            }
        }
    }

    /// A row may have several options, and then a default for each.
    fn default_in(rows: &[(&'static str, &'static str)], option: &str) -> &'static str {
        let has = |names: &str| names.split(", ").position(|name| name == option);
        let found = rows
            .iter()
            .find_map(|(names, defaults)| Some((has(names)?, defaults)));
        let (at, defaults) = found.unwrap_or_else(|| panic!("{option} is in no row"));
        defaults.split(", ").nth(at).unwrap_or_default()
    }

    #[test]
    fn an_option_of_the_daemon_has_the_variable_of_its_name() {
        for option in built(&PAGES[0]).get_arguments() {
            let Some(long) = option
                .get_long()
                .filter(|long| !["help", "version"].contains(long))
            else {
                continue;
            };
            let variable = format!("TUNNELD_{}", long.to_uppercase().replace('-', "_"));
            assert_eq!(option.get_env().unwrap().to_str(), Some(variable.as_str()));
        }
    }
}
