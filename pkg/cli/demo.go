package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/pkg/config"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

const (
	demoDuration  = 12 * time.Second
	demoRotations = 3
	demoShortest  = 2 * time.Second
	// demoSVIDTTL is short, so that each service renews its SVID several times
	// while one watches.
	demoSVIDTTL = 6 * time.Second
	// demoStart and demoStop bound how long a service takes to begin and end.
	demoStart = 15 * time.Second
	demoStop  = 5 * time.Second
)

func (a *app) demoCommand() *cobra.Command {
	return noun("demo", "see it work",
		"A demo runs a trust domain of its own in a temporary directory, and removes it.",
		"  hallmark demo mtls",
		a.demoMTLS(), a.demoService())
}

func (a *app) demoMTLS() *cobra.Command {
	length := duration{config.Duration(demoDuration)}
	cmd := &cobra.Command{
		Use:   "mtls",
		Short: "two services call each other while the authority rotates",
		Long: "The demo runs two small services, shop and stock, as processes of their own. Each gets\n" +
			"its identity over the Workload API, because of the program that it runs. shop calls\n" +
			"stock without pause, each time over a new connection on which both prove who they\n" +
			"are, while the authority that signs their SVIDs is rotated. It fails if any request\n" +
			"failed.",
		Example: "  hallmark demo mtls\n  hallmark demo mtls --duration 1m",
		Args:    noArguments,
	}
	cmd.Flags().Var(&length, "duration", "how `long` to call; longer if the rotations take longer")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if time.Duration(length.Duration) < demoShortest {
			return usageError(fmt.Errorf("--duration must be at least %v", demoShortest))
		}
		o := domainOptions{
			ephemeral: true, trustDomain: devTrustDomain, listen: "127.0.0.1:0",
			serverYAML: fmt.Sprintf("\nx509:\n  svid_lifetime: %v\n", demoSVIDTTL),
		}
		return a.runDomain(cmd.Context(), o, func(ctx context.Context, d *domain) error {
			return a.runDemo(ctx, d, time.Duration(length.Duration))
		})
	}
	return cmd
}

// demoEvent is what a service tells the demo, as a line of JSON.
type demoEvent struct {
	Service   string `json:"service"`
	Address   string `json:"address,omitempty"`   // it listens
	Authority string `json:"authority,omitempty"` // its SVID is new; ID of what signed it
	Made      int    `json:"made,omitempty"`      // requests so far
	Failed    int    `json:"failed,omitempty"`
	Error     string `json:"error,omitempty"`
	Done      bool   `json:"done,omitempty"`
	ended     error  // the process is gone
}

// demoProcess is a service that runs.
type demoProcess struct {
	name  string
	id    spiffeid.ID
	path  string // of its program
	cmd   *exec.Cmd
	stdin io.WriteCloser // closing it tells the service to end
}

// launch copies this program, so that the agent can tell the services apart by
// what they run, registers the copy's identity and starts it.
func (a *app) launch(ctx context.Context, d *domain, name string, events chan<- demoEvent, readers *sync.WaitGroup, args ...string) (*demoProcess, error) {
	p := &demoProcess{name: name, path: filepath.Join(d.dir, name)}
	self, err := os.Executable()
	if err == nil {
		err = linkOrCopy(self, p.path)
	}
	if err != nil {
		return nil, fmt.Errorf("make the program of %s: %w", name, err)
	}
	if p.path, err = filepath.EvalSymlinks(p.path); err != nil {
		return nil, err
	}
	if p.id, err = spiffeid.FromPath(d.trustDomain, "/"+name); err != nil {
		return nil, err
	}
	if _, err := d.ensureEntry(ctx, "demo-"+name, p.id, d.alias, "unix:path:"+p.path); err != nil {
		return nil, err
	}
	p.cmd = exec.CommandContext(ctx, p.path, append([]string{"demo", "service", name}, args...)...)
	p.cmd.Env = append(os.Environ(), workloadapi.SocketEnv+"="+workloadAddress(d.workloadSocket))
	p.cmd.Stderr = os.Stderr // the log
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	readers.Go(func() {
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var e demoEvent
			if json.Unmarshal(lines.Bytes(), &e) == nil {
				events <- e
			}
		}
		err := p.cmd.Wait()
		if err == nil {
			err = errors.New("it ended")
		}
		events <- demoEvent{Service: name, ended: err}
	})
	return p, nil
}

// linkOrCopy makes a file have another name.
func linkOrCopy(from, to string) error {
	if err := os.Link(from, to); err == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// demo is what is known of the two services while they run.
type demo struct {
	app         *app
	started     time.Time
	calls       demoEvent         // latest counts
	authorities map[string]string // by service
	renewals    int
	rotations   int
}

func (a *app) runDemo(ctx context.Context, d *domain, length time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	events := make(chan demoEvent)
	var readers sync.WaitGroup
	defer func() {
		cancel() // kills what still runs
		go func() { readers.Wait(); close(events) }()
		for range events { // so that no reader waits
		}
	}()

	stock, err := a.launch(ctx, d, "stock", events, &readers)
	if err != nil {
		return err
	}
	address := ""
	if err := await(ctx, events, demoStart, func(e demoEvent) bool { address = e.Address; return address != "" }); err != nil {
		return fmt.Errorf("start stock: %w", err)
	}
	shop, err := a.launch(ctx, d, "shop", events, &readers, address)
	if err != nil {
		return err
	}
	m := &demo{app: a, authorities: map[string]string{}}
	if err := await(ctx, events, demoStart, func(e demoEvent) bool { m.observe(e); return m.calls.Made > 0 }); err != nil {
		return fmt.Errorf("start shop: %w", err)
	}
	m.started = a.now()
	m.intro(shop, stock)
	m.line("calling; authority " + short(m.authorities["shop"]) + " signed both")

	end := time.NewTimer(length)
	defer end.Stop()
	rotate := time.NewTicker(length / (demoRotations + 1))
	defer rotate.Stop()
	rotated := make(chan rotation)
	due, running := 0, false // rotations that should have come about; one is under way
	for over := false; !over || m.rotations < demoRotations; {
		if !running && m.rotations < due {
			running = true
			go func() {
				resp, err := d.admin.server().RotateAuthority(ctx, &hallmarkv1.RotateAuthorityRequest{Kind: hallmarkv1.Authority_KIND_X509})
				select {
				case rotated <- rotation{resp.GetActivated().GetId(), rpcError("rotate the authority", err)}:
				case <-ctx.Done():
				}
			}()
		}
		select {
		case e := <-events:
			if e.ended != nil {
				return fmt.Errorf("%s stopped: %w", e.Service, e.ended)
			}
			if m.observe(e) {
				m.line(e.Service + " has a new SVID, signed by " + short(e.Authority))
			}
		case <-rotate.C:
			due = min(due+1, demoRotations)
		case r := <-rotated:
			running = false
			if r.err != nil {
				return r.err
			}
			m.rotations++
			m.line("authority rotated; " + short(r.id) + " signs from now on")
		case <-end.C:
			over, due = true, demoRotations
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return m.finish(ctx, events, shop)
}

type rotation struct {
	id  string
	err error
}

// await takes events until one is the awaited.
func await(ctx context.Context, events <-chan demoEvent, within time.Duration, is func(demoEvent) bool) error {
	timer := time.NewTimer(within)
	defer timer.Stop()
	for {
		select {
		case e := <-events:
			if e.ended != nil {
				return fmt.Errorf("%s stopped: %w", e.Service, e.ended)
			}
			if is(e) {
				return nil
			}
		case <-timer.C:
			return fmt.Errorf("nothing happened within %v", within)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// observe takes note of an event. It reports whether a service's authority is
// another one than before.
func (m *demo) observe(e demoEvent) bool {
	if e.Made > 0 {
		m.calls = e
	}
	if e.Authority == "" {
		return false
	}
	before, known := m.authorities[e.Service]
	m.authorities[e.Service] = e.Authority
	if known {
		m.renewals++
	}
	return known && before != e.Authority
}

func (m *demo) intro(shop, stock *demoProcess) {
	s := m.app.style
	fmt.Fprintf(m.app.out, "\n  %s\n\n", s.bold("Two services, told apart by the program they run"))
	d := details{style: s}
	for _, p := range []*demoProcess{shop, stock} {
		d.items = append(d.items, detail{"  " + p.name, text(p.id.String(), "unix:path:"+p.path)})
	}
	fmt.Fprintf(m.app.out, "%s\n  %s\n\n", d.String(),
		"shop calls stock without pause, each time over a new mTLS connection.")
	fmt.Fprintf(m.app.out, "  %s\n", s.dim("  TIME   REQUESTS  FAILED"))
}

func (m *demo) line(what string) {
	s := m.app.style
	failed := fmt.Sprintf("%6s", thousands(m.calls.Failed))
	if m.calls.Failed > 0 {
		failed = s.red(failed)
	}
	fmt.Fprintf(m.app.out, "  %5.1fs  %9s  %s  %s\n", m.app.now().Sub(m.started).Seconds(), thousands(m.calls.Made), failed, s.dim(what))
}

// finish ends the calls and draws the line.
func (m *demo) finish(ctx context.Context, events <-chan demoEvent, shop *demoProcess) error {
	shop.stdin.Close()
	if err := await(ctx, events, demoStop, func(e demoEvent) bool { m.observe(e); return e.Done }); err != nil {
		return fmt.Errorf("end the calls: %w", err)
	}
	m.line("done")
	s := m.app.style
	sum := fmt.Sprintf("%s, %s of the authority, %s: %s failed", count(m.calls.Made, "request", "requests"),
		count(m.rotations, "rotation", "rotations"), count(m.renewals, "new SVID", "new SVIDs"), thousands(m.calls.Failed))
	if m.calls.Failed > 0 {
		fmt.Fprintf(m.app.out, "\n  %s %s\n\n", s.red("✗"), s.bold(sum))
		return fmt.Errorf("%s failed; the first: %s", count(m.calls.Failed, "request", "requests"), printable(m.calls.Error))
	}
	fmt.Fprintf(m.app.out, "\n  %s %s\n\n", s.green("✓"), s.bold(sum))
	return nil
}

// short is enough of an authority's ID to tell it from others.
func short(id string) string {
	const n = 8
	id = strings.ToLower(id)
	if len(id) > n {
		id = id[:n]
	}
	return printable(id)
}
