//! The conformance page (`necp-user/docs/conformance.md`) names tests: those that it names exist.

use std::collections::BTreeSet;

/// The tests that the page's last columns name.
fn named(page: &str) -> BTreeSet<&str> {
    let rows = page.lines().filter(|line| line.starts_with("| ") && line.ends_with(" |"));
    let last = rows.filter_map(|row| row.trim_end_matches(" |").rsplit_once(" | ").map(|(_, last)| last));
    last.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
}

/// The functions marked as tests in a source.
fn tests(source: &str) -> impl Iterator<Item = &str> {
    let mut is_test = false;
    source.lines().filter_map(move |line| {
        let line = line.trim();
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_test = true;
            return None;
        }
        let name = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ")?.split('(').next()?;
        std::mem::take(&mut is_test).then_some(name)
    })
}

#[test]
fn every_test_that_the_conformance_page_names_exists() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let page = std::fs::read_to_string(root.join("necp-user/docs/conformance.md")).unwrap();
    let sources = crate::tree::sources(root).unwrap();
    let exist: BTreeSet<&str> = sources.iter().flat_map(|(_, source)| tests(source)).collect();
    let named = named(&page);
    assert!(named.len() > 50, "{}", named.len());
    let missing: Vec<_> = named.difference(&exist).collect();
    assert!(missing.is_empty(), "the page names tests that do not exist: {missing:?}");
}

#[test]
fn names_are_read_off_page_and_source() {
    assert_eq!(named("| a `b` | c | `d`, `e` |\nno `f`\n").into_iter().collect::<Vec<_>>(), ["d", "e"]);
    assert_eq!(tests("#[test]\nfn a() {\nfn b() {\n  #[test]\n  fn c(x: u8) {").collect::<Vec<_>>(), ["a", "c"]);
}
