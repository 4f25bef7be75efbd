//! Pages of known numbers.

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::*;
use crate::overview::{Core, Instance, Overview, Route};
use crate::top::{Sample, Scrape};

/// Two cores, of which the first has had 2,000 requests in two seconds and the second none.
fn metrics(second: u64) -> String {
    let requests = second * 1000;
    let (fast, all) = (requests / 2, requests);
    let gpu = "gpu=\"GPU-0123456789abcdef-long\",tag=\"weights\",generation=\"second\"";
    format!(
        "corelane_build_info{{version=\"9.8.7\"}} 1\n\
         corelane_uptime_seconds {}\n\
         corelane_ring_info{{core=\"0\",cpu=\"4\",ring=\"uring\",cause=\"auto\"}} 1\n\
         corelane_ring_info{{core=\"1\",cpu=\"5\",ring=\"epoll\",cause=\"auto\"}} 1\n\
         corelane_requests_total{{core=\"0\",cpu=\"4\"}} {requests}\n\
         corelane_requests_total{{core=\"1\",cpu=\"5\"}} 7\n\
         corelane_system_calls_total{{core=\"0\",cpu=\"4\"}} {}\n\
         corelane_ticks_total{{core=\"0\"}} {}\n\
         corelane_idle_ticks_total{{core=\"0\"}} {}\n\
         corelane_refused_total{{core=\"1\",reason=\"overloaded\"}} {}\n\
         corelane_in_flight{{core=\"0\"}} 12\n\
         corelane_connections{{core=\"0\"}} 64\n\
         corelane_buffers_held_peak{{core=\"0\"}} 96\n\
         corelane_locality_ratio{{core=\"0\"}} 0.75\n\
         corelane_hop_seconds_bucket{{le=\"0.00002\",core=\"0\"}} {fast}\n\
         corelane_hop_seconds_bucket{{le=\"0.00004\",core=\"0\"}} {all}\n\
         corelane_hop_seconds_bucket{{le=\"+Inf\",core=\"0\"}} {all}\n\
         corelane_discovery_watched_keys 3\n\
         corelane_discovery_lease_losses_total 1\n\
         corelane_nats_connected 1\n\
         corelane_gpu_mem_state{{{gpu},state=\"RW\"}} 1\n\
         corelane_gpu_mem_writer_pid{{{gpu}}} 4711\n\
         corelane_gpu_mem_waiters{{{gpu}}} 2\n\
         corelane_gpu_mem_bytes_held{{{gpu}}} 1500000000\n",
        123 + second,
        requests * 3 / 2,
        second * 500,
        second * 10,
        second * 50,
    )
}

fn overview(second: u64, instances: u64) -> Overview {
    let instance = |number: u64| Instance {
        id: format!("{:x}", 0xa0 + number),
        address: Some(format!("10.0.0.{number}:7000")),
        load: number as f64 + 0.5,
        unanswered: number,
        answered: second * 100 * number,
        failed: second * number,
        barrier: (number == 2).then(|| "inhibited".to_owned()),
        barrier_ms: (number == 2).then_some(3_200),
        ..Instance::default()
    };
    let core = |core: u64| Core {
        core,
        cpu: Some(core + 4),
        ring: "uring".into(),
        idle: if core == 0 { "block" } else { "spin" }.into(),
        buffers: 4096,
        answers: core == 0,
    };
    Overview {
        identity: Some("1f".into()),
        discovery: "etcd".into(),
        cores: vec![core(0), core(1)],
        routes: vec![Route {
            listen: "dynamo/router/generate".into(),
            policy: "least_loaded".into(),
            registered: true,
            instances: (1..=instances).map(instance).collect(),
            ..Route::default()
        }],
        ..Overview::default()
    }
}

fn sample(second: u64, instances: u64) -> Sample {
    Sample {
        at: Duration::from_secs(second),
        metrics: Scrape::parse(&metrics(second)),
        overview: Some(overview(second, instances)),
    }
}

fn sight(instances: u64, sort: Sort) -> Sight {
    Sight::of(Some(&sample(1, instances)), &sample(3, instances), sort)
}

/// What stands on a terminal.
fn terminal(sight: &Sight, ui: Ui, columns: u16, lines: u16) -> Vec<String> {
    let frame = Frame {
        sight: Some(sight),
        address: "127.0.0.1:9090",
        trouble: None,
        ui,
        keys: true,
    };
    let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
    terminal
        .draw(|on| frame.render(on.area(), on.buffer_mut()))
        .unwrap();
    let buffer = terminal.backend().buffer();
    let line = |y: u16| {
        let cells = (0..columns).map(|x| buffer[(x, y)].symbol());
        cells.collect::<String>().trim_end().to_owned()
    };
    (0..lines).map(line).collect()
}

#[test]
fn everything_fits_on_80_columns_and_24_lines() {
    let shown = terminal(&sight(2, Sort::Name), Ui::default(), 80, 24);
    let wanted = "\
corelane 9.8.7 at 127.0.0.1:9090, up 2m 6s
1000/s requests, 50/s refused, 12 in flight, 64 connections
CORE CPU RING  GEAR    REQ/S    P50    P99  CALLS   BUF LOW FLIGHT REF/S LOCAL
   0   4 uring hot      1000 20.0us 39.6us   1.50 4000/4096     12     0  0.75
   1   5 epoll still       0      -      -      - 4096/4096      0    50     -
ROUTE, INSTANCE               REQ/S    LOAD   BUSY ERRORS ERR/S STATE
dynamo/router/generate          300       4      3      9     3 1/2 least_loaded
  a1 10.0.0.1:7000              100     1.5      1      3     1 ready
  a2 10.0.0.2:7000              200     2.5      2      6     2 inhibited 3.2s
PLANE     STATE
discovery etcd, identity 1f, 1 of 1 routes registered
watches   3 keys, 0 stale, 0 reconnects, 1 leases lost, 0 writes deferred
nats      connected
GPU               POOL         STATE            HOLDER      WAIT TO WRITE   HELD
GPU-0123456789ab… weights      RW               pid 4711       2        0  1.5GB








q quit  s sort: name  n next page: 1 of 1  space pause  1-5 all cores routes pla";
    let wanted: Vec<&str> = wanted.lines().collect();
    for (line, (shown, wanted)) in shown.iter().zip(&wanted).enumerate() {
        assert_eq!(shown, wanted, "line {line}");
    }
    assert_eq!(shown.len(), wanted.len());
}

#[test]
fn what_does_not_fit_is_on_further_pages() {
    let sight = sight(40, Sort::Name);
    let page = |page: usize| {
        let ui = Ui {
            page,
            ..Ui::default()
        };
        terminal(&sight, ui, 80, 24)
    };
    let has = |page: &[String], words: &str| page.iter().any(|line| line.contains(words));
    let (first, second) = (page(0), page(1));
    assert!(has(&first, " a1 10.0.0.1:7000") && !has(&first, " c8 10.0.0.40:7000"));
    assert!(!has(&second, " a1 10.0.0.1:7000"));
    for words in ["CORE CPU", "ROUTE, INSTANCE", "PLANE", "GPU  ", "q quit"] {
        assert!(has(&first, words), "{words} in {first:#?}");
    }
    // Every instance is on some page.
    let pages = first.last().unwrap().split(" of ").nth(1).unwrap();
    let pages: usize = pages.split(' ').next().unwrap().parse().unwrap();
    assert!(pages > 1);
    let all: Vec<String> = (0..pages).flat_map(page).collect();
    for number in 1..=40 {
        let words = format!(" {:x} 10.0.0.{number}:7000", 0xa0 + number);
        assert!(has(&all, &words), "{words}");
    }
    assert_eq!(page(pages), first, "after the last comes the first");
}

#[test]
fn rows_are_sorted_as_asked() {
    for (sort, first) in [
        (Sort::Name, "a1"),
        (Sort::Requests, "a3"),
        (Sort::Load, "a3"),
        (Sort::Errors, "a3"),
    ] {
        let sight = sight(3, sort);
        assert_eq!(sight.routes[0].instances[0].id, first, "{sort:?}");
    }
    assert_eq!(sight(3, Sort::Errors).cores[0].core, "1");
}

#[test]
fn small_and_odd_terminals_are_drawn_on_too() {
    let sight = sight(5, Sort::Name);
    for view in View::ALL {
        let ui = Ui {
            view,
            page: 7,
            ..Ui::default()
        };
        for (columns, lines) in [(1, 1), (20, 3), (40, 10), (300, 2), (80, 4), (200, 100)] {
            terminal(&sight, ui, columns, lines);
        }
    }
    let nothing = Sight::of(None, &Sample::default(), Sort::Load);
    terminal(&nothing, Ui::default(), 80, 24);
}

#[test]
fn trouble_is_said_and_what_was_seen_last_stays() {
    let sight = sight(1, Sort::Name);
    let mut frame = Frame {
        sight: Some(&sight),
        address: "10.0.0.7:9090",
        trouble: Some("10.0.0.7:9090 does not answer: refused"),
        ui: Ui::default(),
        keys: false,
    };
    let text = frame.text(80);
    assert!(text.contains("does not answer: refused") && text.contains("10.0.0.1:7000"));
    frame.sight = None;
    let text = frame.text(80);
    assert!(text.starts_with("corelane at 10.0.0.7:9090\n") && text.contains("refused"));
}

#[test]
fn text_has_all_rows_however_many() {
    let sight = sight(200, Sort::Name);
    let frame = Frame {
        sight: Some(&sight),
        address: "x:1",
        trouble: None,
        ui: Ui {
            view: View::Routes,
            ..Ui::default()
        },
        keys: false,
    };
    let text = frame.text(120);
    assert_eq!(text.lines().count(), 2 + 1 + 1 + 200);
    assert!(text.lines().all(|line| line.chars().count() <= 120));
    assert!(text.contains("10.0.0.200:7000"));
}

#[test]
fn a_long_id_makes_room_for_the_address() {
    let row = |id: &str| InstanceRow {
        id: id.into(),
        address: "127.0.0.1:38661".into(),
        ..InstanceRow::default()
    };
    for (id, width, shown) in [
        ("1875694346513ac5", 27, "  1875…3ac5 127.0.0.1:38661"),
        ("1875694346513ac5", 40, "  1875694346513ac5 127.0.0.1:38661"),
        ("1875694346513ac5", 16, "  1875…3ac5 127…"),
        ("a1", 27, "  a1 127.0.0.1:38661"),
    ] {
        assert_eq!(label(&row(id), width), shown);
    }
    // Whatever a process says: no more than there is room for.
    for id in ["äöüäöüäöüäöü", "", "a", "€€€€€"] {
        assert!(label(&row(id), 12).chars().count() <= 12, "{id}");
    }
}

#[test]
fn numbers_and_times_stay_short() {
    for (value, text) in [
        (0.0, "0"),
        (0.04, "0.0"),
        (3.25, "3.2"),
        (12.6, "13"),
        (99_999.0, "99999"),
        (123_456.0, "123k"),
        (12_345_678.0, "12.3M"),
        (8e11, "800.0G"),
    ] {
        assert_eq!(short(value), text, "{value}");
    }
    for (seconds, text) in [
        (12.34e-6, "12.3us"),
        (999.6e-6, "1000us"),
        (12.34e-3, "12.3ms"),
        (8.6, "8.6s"),
    ] {
        assert_eq!(time(seconds), text, "{seconds}");
    }
    assert_eq!(uptime(Duration::from_secs(90_061)), "1d 1h");
}
