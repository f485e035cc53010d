package simulation

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	seed  = flag.Uint64("seed", 0, "the first life's seed (default: of the clock)")
	days  = flag.Int("days", 0, "days of a life (default: by the seed)")
	lives = flag.Int("lives", 1, "how many lives, of seeds that follow")
	lasts = flag.Duration("for", 0, "begin lives until then, however many that are")
	once  = flag.Bool("first", false, "end the process at the first broken life")
	tells = flag.Bool("tell", false, "print each life's whole story")
)

func TestWorld(t *testing.T) {
	first := *seed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	began := time.Now()
	var next, calls, leases, broken atomic.Int64
	var lived atomic.Int64
	var group sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for {
				i := next.Add(1) - 1
				enough := i >= int64(*lives)
				if *lasts > 0 {
					enough = time.Since(began) >= *lasts
				}
				if enough || broken.Load() >= 10 {
					next.Add(-1)
					return
				}
				if *once { // the process may not get to its end
					fmt.Println("life", i+1)
				}
				s := SettingsOf(first+uint64(i), *days)
				r := Live(t, s)
				if *tells && (*lives == 1 || r.Broken != "") {
					for _, line := range r.Log {
						fmt.Println(line)
					}
				}
				if r.Broken != "" {
					if *once { // other lives may last for minutes
						fmt.Printf("%s\nbroken: %s; lives %d; seconds %.0f\n", r.Story, r.Broken, next.Load(), time.Since(began).Seconds())
						os.Exit(1)
					}
					broken.Add(1)
					t.Errorf("%s", r.Story)
				}
				calls.Add(int64(r.Calls))
				leases.Add(int64(r.Leases))
				lived.Add(int64(r.Lived))
			}
		})
	}
	group.Wait()
	t.Logf("%d lives, %s of simulated time, %d calls, %d leases, in %s", next.Load(), time.Duration(lived.Load()), calls.Load(), leases.Load(), time.Since(began))
}
