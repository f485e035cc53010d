// Command bench measures the engine and a null engine, which does nothing, in one
// run on a real Vault with the simulator. It prints a table and writes JSON;
// docs/performance.md explains the figures.
//
// What must stay true: times are compared only within a run, and the two engines
// alternate within each repetition, since a machine's speed changes within
// minutes; the load, the paths and the leases are the same for both; a missed
// target is a result, while a failed measurement and leftovers are errors. The
// program always ends all processes that it started.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"vault-plugin-secrets-openai/test/devenv"
)

// settings are the options of a run, and part of its report.
type settings struct {
	Repetitions int      `json:"repetitions"`
	Quick       bool     `json:"quick"` // one small repetition, to test the benchmark itself
	Only        []string `json:"only,omitempty"`
	Output      string   `json:"-"`
	Profile     bool     `json:"profile,omitempty"`
}

// size returns one of two amounts, depending on -quick.
func (s settings) size(usual, quick int) int {
	if s.Quick {
		return quick
	}
	return usual
}

// bound is the maximum duration of a run on any machine.
const bound = 20 * time.Minute

// section is a part of the run that -only can select.
type section struct {
	name string
	run  func(context.Context, *lab) error
}

var sections = []section{
	{"issue", issue},
	{"burst", burst},
	{"leases", leases},
	{"static", static},
	{"crowd", crowd},
	{"connections", connections},
	{"raft", raft},
	{"growth", growth},
	{"startup", startup},
	{"limit", limit},
	{"functions", functions},
}

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer cancel()
	debug.SetGCPercent(400) // this program shares the cores with what it measures
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		if ctx.Err() != nil {
			err = fmt.Errorf("interrupted, then %w", err)
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string, errOut io.Writer) (settings, error) {
	var s settings
	var names []string
	for _, section := range sections {
		names = append(names, section.name)
	}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(errOut)
	fs.IntVar(&s.Repetitions, "count", 3, "`number` of repetitions; the figures are medians")
	fs.BoolVar(&s.Quick, "quick", false, "run one small repetition, to test the benchmark itself")
	fs.BoolVar(&s.Profile, "profile", false, "write profiles of the plugin, Vault and this program under load, and measure nothing")
	fs.StringVar(&s.Output, "o", "", "`folder` for bench.json and the profiles (default: dist in the checkout)")
	only := fs.String("only", "", "comma-separated `sections`: "+strings.Join(names, ", "))
	if err := fs.Parse(args); err != nil {
		return s, err
	}
	if fs.NArg() > 0 {
		return s, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if s.Repetitions < 1 {
		return s, errors.New("-count must be positive")
	}
	if *only != "" {
		s.Only = strings.Split(*only, ",")
	}
	for _, name := range s.Only {
		if !slices.Contains(names, name) {
			return s, fmt.Errorf("unknown section %q; the sections are %s", name, strings.Join(names, ", "))
		}
	}
	if s.Quick {
		s.Repetitions = 1
	}
	if s.Output == "" {
		root, err := devenv.Root()
		if err != nil {
			return s, err
		}
		s.Output = filepath.Join(root, "dist")
	}
	return s, nil
}

func run(ctx context.Context, args []string, out, errOut io.Writer) (err error) {
	s, err := parse(args, errOut)
	if err != nil {
		return err
	}
	devenv.IsolateEnv()
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	m, err := describe(ctx)
	if err != nil {
		return err
	}
	l, err := open(ctx, s, errOut)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	if s.Profile {
		return profile(ctx, l, out)
	}
	began := time.Now() // without the builds, which may be cached
	for _, section := range sections {
		if len(s.Only) > 0 && !slices.Contains(s.Only, section.name) {
			continue
		}
		l.say("%s (%d s)", section.name, int(time.Since(began).Seconds()))
		l.book.section = section.name
		if err := section.run(ctx, l); err != nil {
			return fmt.Errorf("%s: %w", section.name, err)
		}
	}
	if err := l.book.settle(); err != nil {
		return err
	}
	m.Vault = l.version
	m.finish(l)
	m.Seconds = int(time.Since(began).Seconds())
	m.print(out, s)
	if err := l.book.table(out); err != nil {
		return err
	}
	if len(l.functions) > 0 {
		fmt.Fprintf(out, "\n%s\n", strings.Join(l.functions, "\n"))
	}
	if err := l.book.asked(out); err != nil {
		return err
	}
	r := report{Machine: m, Settings: s, Figures: l.book.figures, Functions: l.functions}
	path := filepath.Join(s.Output, "bench.json")
	if err := r.write(path); err != nil {
		return err
	}
	if err := l.book.page(filepath.Join(s.Output, "bench.md"), m); err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%s. All figures: %s\n", l.book.verdict(), path)
	return nil
}
