//! What is logged, and in which form. The lines go through [`stderr`].

use std::env::VarError;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::SystemTime;

use env_logger::{Builder, Target};
use log::kv::{self, Key, Source, Value, VisitSource, VisitValue};
use log::{Level, LevelFilter, Record};
use serde_json::json;

use crate::log_limit::LogLimit;
use crate::stderr;

const VARIABLE: &str = "RUST_LOG";

/// The form of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// For people: `[time level module] message: field=value`.
    Text,
    /// An object with the same in the same order.
    Json,
}

/// Logs what `RUST_LOG` says from now on, panics included; otherwise everything from info up. To be called once.
pub fn start(format: Format) {
    let (directives, complaint) = match directives(std::env::var(VARIABLE)) {
        Ok(directives) => (directives, None),
        Err(complaint) => (String::new(), Some(complaint)),
    };
    let mut builder = Builder::new();
    if !speaks_of_us(&directives) {
        builder.filter_level(LevelFilter::Info);
    }
    builder.parse_filters(&directives);
    builder.format(move |line, record| line.write_all(Line::of(record).written(format).as_bytes()));
    builder.target(Target::Pipe(Box::new(Lines))).init();
    stderr::set_notice(match format {
        Format::Text => |dropped| Line::of_dropped(dropped).written(Format::Text),
        Format::Json => |dropped| Line::of_dropped(dropped).written(Format::Json),
    });
    std::panic::set_hook(Box::new(|panic| {
        static PANICS: LogLimit = LogLimit::new(2);
        PANICS.log("internal errors", || {
            log::error!("internal error in one thread: {panic}")
        });
    }));
    if let Some(complaint) = complaint {
        log::warn!("{complaint}");
    }
}

/// A line before it has a form.
struct Line<'a> {
    time: SystemTime,
    level: Level,
    module: &'a str,
    message: String,
    fields: &'a dyn Source,
}

impl<'a> Line<'a> {
    fn of(record: &'a Record<'_>) -> Line<'a> {
        Line {
            time: SystemTime::now(),
            level: record.level(),
            module: record.target(),
            message: record.args().to_string(),
            fields: record.key_values(),
        }
    }

    /// That lines are missing here. It is told whatever is logged.
    fn of_dropped(dropped: u64) -> Line<'static> {
        Line {
            time: SystemTime::now(),
            level: Level::Warn,
            module: concat!(env!("CARGO_CRATE_NAME"), "::stderr"),
            message: format!("{dropped} log lines were dropped: nobody read stderr in time"),
            fields: &NO_FIELDS,
        }
    }

    fn written(&self, format: Format) -> String {
        let mut fields = Fields {
            line: String::with_capacity(256),
            format,
            separator: "",
            pair_start: 0,
        };
        match format {
            Format::Text => self.write_text(&mut fields),
            Format::Json => self.write_json(&mut fields),
        }
        fields.line
    }

    /// Further lines of a message, such as a panic's, are indented, so that they can't be taken for others. Those of
    /// other crates may hold a peer's bytes.
    fn write_text(&self, fields: &mut Fields) {
        let time = humantime::format_rfc3339_seconds(self.time);
        let (level, module) = (self.level, self.module);
        let _ = write!(fields.line, "[{time} {level:<5} {module}] ");
        for character in self.message.chars() {
            match character {
                '\n' => fields.line.push_str("\n    "),
                '\t' => fields.line.push('\t'),
                _ if steers_a_terminal(character) => {
                    fields.line.extend(character.escape_unicode());
                }
                _ => fields.line.push(character),
            }
        }
        fields.separator = ": ";
        let _ = self.fields.visit(fields);
        fields.line.push('\n');
    }

    fn write_json(&self, fields: &mut Fields) {
        let time = humantime::format_rfc3339_millis(self.time);
        let (level, module) = (self.level, json!(self.module));
        let message = json!(self.message);
        let _ = write!(
            fields.line,
            r#"{{"time":"{time}","level":"{level}","module":{module},"message":{message}"#
        );
        fields.separator = ",";
        let _ = self.fields.visit(fields);
        fields.line.push_str("}\n");
    }
}

/// Whether it is a control character, is not seen, or changes the direction or the lines of what is.
pub fn steers_a_terminal(character: char) -> bool {
    let is_invisible_or_bidi = matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
    character.is_control() || is_invisible_or_bidi
}

const NO_FIELDS: [(&str, Value<'static>); 0] = [];

/// Appends fields to a line. A string that may hold anything is quoted in text, too, what is captured by `:%` or `:?`
/// is not; a float is seconds. What is null is `-` in text and left out in JSON.
struct Fields {
    line: String,
    format: Format,
    /// Before the next one.
    separator: &'static str,
    /// Where in the line the last one begins.
    pair_start: usize,
}

impl<'a> VisitSource<'a> for Fields {
    fn visit_pair(&mut self, key: Key<'a>, value: Value<'a>) -> Result<(), kv::Error> {
        self.pair_start = self.line.len();
        let separator = self.separator;
        let _ = match self.format {
            Format::Text => write!(self.line, "{separator}{key}="),
            Format::Json => write!(self.line, "{separator}{}:", json!(key.as_str())),
        };
        if self.format == Format::Text {
            self.separator = " ";
        }
        value.visit(self)
    }
}

impl VisitValue<'_> for Fields {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), kv::Error> {
        let _ = match self.format {
            Format::Text => write!(self.line, "{value}"),
            Format::Json => write!(self.line, "{}", json!(value.to_string())),
        };
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), kv::Error> {
        match self.format {
            Format::Text => self.line.push('-'),
            Format::Json => self.line.truncate(self.pair_start),
        }
        Ok(())
    }

    fn visit_str(&mut self, value: &str) -> Result<(), kv::Error> {
        let _ = match self.format {
            Format::Text => write!(self.line, "{value:?}"),
            Format::Json => write!(self.line, "{}", json!(value)),
        };
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), kv::Error> {
        let _ = write!(self.line, "{value}");
        Ok(())
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), kv::Error> {
        let _ = match self.format {
            Format::Text => write!(self.line, "{value:.3}s"),
            Format::Json => write!(self.line, "{value:.3}"),
        };
        Ok(())
    }
}

/// Takes a whole line at a time, as env_logger writes them.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        stderr::add(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the variable says, or what is wrong with it.
fn directives(variable: Result<String, VarError>) -> Result<String, String> {
    let wrong = |value: &str, why: &dyn std::fmt::Display| {
        format!("{VARIABLE}={value} is ignored: {why}; write it as warn, or as tunneld=debug")
    };
    match variable {
        Ok(text) => match env_filter::Builder::new().try_parse(&text) {
            Ok(_) => Ok(text),
            Err(error) => Err(wrong(&format!("{text:?}"), &error)),
        },
        Err(VarError::NotPresent) => Ok(String::new()),
        Err(VarError::NotUnicode(value)) => Err(wrong(&format!("{value:?}"), &"it is not UTF-8")),
    }
}

/// Whether a directive is about this crate, or about all. Those for other programs, which a whole environment
/// shares, must not silence this one.
fn speaks_of_us(directives: &str) -> bool {
    let (directives, _message) = directives.split_once('/').unwrap_or((directives, ""));
    let mut directives = directives.split(',').map(str::trim);
    directives.any(|directive| match directive.split_once('=') {
        Some((module, _)) => is_ours(module),
        None => directive.parse::<LevelFilter>().is_ok() || is_ours(directive),
    })
}

/// A directive is about every module whose path begins with its own.
fn is_ours(module: &str) -> bool {
    let own = env!("CARGO_CRATE_NAME");
    let within = module
        .strip_prefix(own)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(':'));
    within || (!module.is_empty() && own.starts_with(module))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_for_others_do_not_speak_of_us() {
        for others in [
            "",
            " ",
            ",",
            "myapp=debug",
            "myapp",
            "hyper=warn, tokio::net=trace",
            "tunneldx=error",
            "tunneld_client",
            "myapp=info/tunneld",
            "loud",
        ] {
            assert!(!speaks_of_us(others), "{others:?}");
        }
        for ours in [
            "warn",
            "OFF",
            "myapp=debug,error",
            "tunneld",
            "tunneld=debug",
            "tunneld::dial=debug",
            "myapp=debug, tunneld=off",
            "warn/refused",
            "tun=trace",
        ] {
            assert!(speaks_of_us(ours), "{ours:?}");
        }
    }

    fn written(format: Format, message: &str, fields: &[(&str, Value<'_>)]) -> String {
        let line = Line {
            time: SystemTime::UNIX_EPOCH,
            level: Level::Info,
            module: "tunneld",
            message: message.to_owned(),
            fields: &fields,
        };
        line.written(format)
    }

    #[test]
    fn both_forms_have_the_same_fields_in_the_same_order() {
        let address = "[::1]:5";
        let fields = [
            ("id", Value::from(7u64)),
            ("peer", Value::from_display(&address)),
            ("duration", Value::from(1.5)),
            ("how", Value::from_debug(&Some(1))),
            ("reason", Value::from("it said \"no\"\n\u{1b}")),
        ];
        assert_eq!(
            written(Format::Text, "closed", &fields),
            "[1970-01-01T00:00:00Z INFO  tunneld] closed: id=7 peer=[::1]:5 duration=1.500s how=Some(1) \
             reason=\"it said \\\"no\\\"\\n\\u{1b}\"\n"
        );
        assert_eq!(
            written(Format::Json, "closed", &fields),
            "{\"time\":\"1970-01-01T00:00:00.000Z\",\"level\":\"INFO\",\"module\":\"tunneld\",\
             \"message\":\"closed\",\"id\":7,\"peer\":\"[::1]:5\",\"duration\":1.500,\"how\":\"Some(1)\",\
             \"reason\":\"it said \\\"no\\\"\\n\\u001b\"}\n"
        );
    }

    #[test]
    fn a_field_without_a_value_is_a_dash_or_left_out() {
        let fields = [("id", Value::null()), ("status", Value::from(503u64))];
        let text = written(Format::Text, "refused", &fields);
        assert!(text.ends_with(" refused: id=- status=503\n"), "{text}");
        let json = written(Format::Json, "refused", &fields);
        let rest = "\"message\":\"refused\",\"status\":503}\n";
        assert!(json.ends_with(rest), "{json}");
    }

    #[test]
    fn a_line_is_one_line_or_indented() {
        let text = written(Format::Text, "one\ntwo", &[]);
        assert_eq!(text, "[1970-01-01T00:00:00Z INFO  tunneld] one\n    two\n");
        let text = written(Format::Text, "\u{1b}[2J\r\u{9b}\u{202e}\tcaf\u{e9}", &[]);
        let shown = "] \\u{1b}[2J\\u{d}\\u{9b}\\u{202e}\tcaf\u{e9}\n";
        assert!(text.ends_with(shown), "{text}");
        let json = written(Format::Json, "one\ntwo\u{85}", &[]);
        assert_eq!(json.lines().count(), 1);
        let dropped = Line::of_dropped(2).written(Format::Text);
        assert!(dropped.contains(" WARN  tunneld::stderr] 2 log lines were dropped"));
        let dropped = Line::of_dropped(2).written(Format::Json);
        let object: serde_json::Value = serde_json::from_str(&dropped).unwrap();
        assert_eq!(
            (&object["level"], &object["module"]),
            (&json!("WARN"), &json!("tunneld::stderr"))
        );
    }

    #[test]
    fn a_variable_that_makes_no_sense_is_complained_about() {
        let of = |text: &str| directives(Ok(text.to_owned()));
        assert_eq!(of("myapp=debug,warn"), Ok("myapp=debug,warn".into()));
        assert_eq!(directives(Err(VarError::NotPresent)), Ok(String::new()));
        for text in ["tunneld=loud", "a=b=c", "warn/a/b"] {
            let complaint = of(text).unwrap_err();
            assert!(complaint.contains(&format!("{text:?}")), "{complaint}");
        }
    }
}
