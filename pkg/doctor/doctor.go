// Package doctor examines an installation: a server, an agent, or both, on this
// machine, as whoever runs it sees them. It changes nothing.
//
// [Examine] returns a [Finding] for each thing that it looked at, with what to do
// about it if all is not well. It talks to server and agent over the sockets
// that any client uses, looks at their files as far as it may, and dials the
// server as an agent would. Every wait is bounded.
package doctor

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/pkg/config"
)

// Status is how one thing is.
type Status string

// From good to bad; what was skipped could not be looked at, or makes no sense
// as something else failed.
const (
	OK      Status = "ok"
	Skipped Status = "skipped"
	Warning Status = "warning"
	Failed  Status = "failed"
)

// Finding is what was found out of one thing.
type Finding struct {
	Part    string `json:"part"`  // installation, server, agent or workload
	Check   string `json:"check"` // what was looked at, one or two words
	Status  Status `json:"status"`
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"` // what to do about it
}

// Program is a server or an agent, as far as it is known before it is asked.
type Program struct {
	Socket string // path of its admin socket
	File   string // its configuration; empty if none was found
	Layout config.Layout
	Err    error // why there is no Layout though there is a File
}

// Options of [Examine].
type Options struct {
	Server, Agent *Program // nil: there is none on this machine

	Endpoint      string // of the Workload API: a path, or tcp://ADDRESS:PORT
	EndpointNamed string // what named it, for messages; empty if it was looked for
	EndpointError error  // what is wrong with the address

	Now  func() time.Time                // nil is time.Now
	Free func(path string) (Free, error) // nil asks the file system
}

// Bounds of what is waited for: of one call, and of all.
const (
	callTimeout = 3 * time.Second
	fullTimeout = 15 * time.Second
)

// Examine looks at everything, what does not depend on each other at the same
// time. The findings are in the order in which one would look at them.
func Examine(ctx context.Context, o Options) []Finding {
	ctx, cancel := context.WithTimeout(ctx, fullTimeout)
	defer cancel()
	d := &examination{o}
	if o.Now == nil {
		d.Now = time.Now
	}
	if o.Free == nil {
		d.Free = freeSpace
	}
	if o.Server == nil && o.Agent == nil && o.Endpoint == "" && o.EndpointError == nil {
		p := part{name: "installation"}
		p.fail("sockets", "Start a server or an agent, \"hallmark dev\" for both, or name a configuration with -c.", "there is neither a server nor an agent here")
		return p.findings
	}
	var looks []look
	if o.Server != nil {
		looks = append(looks, look{"server", d.serverFiles}, look{"server", d.server})
	}
	if o.Agent != nil {
		looks = append(looks, look{"agent", d.agentFiles}, look{"agent", d.agent})
	}
	looks = append(looks, look{"workload", d.workload})
	return all(ctx, looks)
}

// examination is one run of [Examine].
type examination struct{ Options }

// look looks at several things of a part, one after the other.
type look struct {
	part string
	do   func(context.Context, *part)
}

// all takes several looks at the same time, and returns the findings in order.
func all(ctx context.Context, looks []look) (out []Finding) {
	parts := make([]part, len(looks))
	var running sync.WaitGroup
	for i, l := range looks {
		parts[i].name = l.part
		running.Go(func() { l.do(ctx, &parts[i]) })
	}
	running.Wait()
	for _, p := range parts {
		out = append(out, p.findings...)
	}
	return out
}

// part collects the findings of a look. One goroutine uses it.
type part struct {
	name     string
	findings []Finding
}

func (p *part) add(s Status, check, remedy, format string, args ...any) {
	p.findings = append(p.findings, Finding{p.name, check, s, fmt.Sprintf(format, args...), remedy})
}

func (p *part) ok(check, format string, args ...any) { p.add(OK, check, "", format, args...) }

func (p *part) skip(check, format string, args ...any) { p.add(Skipped, check, "", format, args...) }

func (p *part) warn(check, remedy, format string, args ...any) {
	p.add(Warning, check, remedy, format, args...)
}

func (p *part) fail(check, remedy, format string, args ...any) {
	p.add(Failed, check, remedy, format, args...)
}

// further takes looks that depend on what was found so far.
func (p *part) further(ctx context.Context, looks ...func(context.Context, *part)) {
	named := make([]look, len(looks))
	for i, l := range looks {
		named[i] = look{p.name, l}
	}
	p.findings = append(p.findings, all(ctx, named)...)
}

// span shows a length of time in its largest unit that counts.
func span(d time.Duration) string {
	switch d = d.Abs(); {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd", d/(24*time.Hour))
	case d >= 2*time.Minute:
		return config.Duration(d.Round(time.Minute)).String()
	}
	return config.Duration(d.Round(time.Second)).String()
}
