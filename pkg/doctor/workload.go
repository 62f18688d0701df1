package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// workload asks the Workload API for an identity of this very process.
func (d *examination) workload(ctx context.Context, p *part) {
	switch {
	case d.EndpointError != nil:
		p.fail("endpoint", "Set it to unix:///PATH or tcp://ADDRESS:PORT.", "%v", d.EndpointError)
		return
	case d.Endpoint == "":
		return
	case d.EndpointNamed != "":
		p.ok("endpoint", "%s names %s", d.EndpointNamed, d.Endpoint)
	default:
		p.add(Skipped, "endpoint", "export "+workloadapi.SocketEnv+"=unix://"+absolute(d.Endpoint), workloadapi.SocketEnv+" is not set here; programs need it to find the Workload API")
	}
	address := d.Endpoint
	if !strings.HasPrefix(address, "tcp://") {
		if _, ok := p.socket(ctx, "agent", address, workloadMode); !ok {
			return
		}
		address = "unix://" + absolute(address)
	}
	asked, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	svids, err := workloadapi.FetchX509SVIDs(asked, workloadapi.WithAddr(address))
	switch {
	case status.Code(err) == codes.PermissionDenied:
		why, remedy := d.explain(ctx)
		p.warn("identity", remedy, "this process gets none: %s", why)
	case err != nil:
		p.fail("identity", "See the agent's log.", "the Workload API does not answer: %s", words(err))
	case !d.Now().Before(svids[0].Certificates[0].NotAfter):
		p.fail("identity", "See what is said of the agent.", "%s %s", svids[0].ID, d.until(svids[0].Certificates[0].NotAfter))
	default:
		more := ""
		if n := len(svids) - 1; n > 0 {
			more = fmt.Sprintf(", and %d more", n)
		}
		p.ok("identity", "this process is %s%s; its SVID %s", svids[0].ID, more, d.until(svids[0].Certificates[0].NotAfter))
	}
}

func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// explain asks the agent why this process has no identity.
func (d *examination) explain(ctx context.Context) (why, remedy string) {
	const entry = "Register one if it should have one: \"hallmark entry create --help\"."
	if d.Agent == nil {
		return "the agent does not say why", entry
	}
	conn, err := dialSocket(d.Agent.Socket)
	if err != nil {
		return err.Error(), entry
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	x, err := hallmarkv1.NewAgentAdminServiceClient(conn).Explain(ctx, &hallmarkv1.ExplainRequest{Pid: int32(os.Getpid())})
	if err != nil {
		return "only the agent's own user and root may ask why", "As root, \"hallmark explain PID\" says which entries a process misses."
	}
	for _, a := range x.Attestors {
		if a.Error != "" {
			why += fmt.Sprintf("attestor %s failed (%s); ", a.Name, a.Error)
		}
	}
	const more = "\"hallmark explain\" shows what your shell has, and every entry. "
	// Those that name nodes are for no process. The first misses least.
	x.Matches = slices.DeleteFunc(x.Matches, func(m *hallmarkv1.ExplainResponse_Match) bool {
		return !slices.ContainsFunc(m.Entry.GetSelectors(), func(s *hallmarkv1.Selector) bool { return s.Type != "spiffe_id" })
	})
	if len(x.Matches) == 0 {
		return why + "this node has no entries", entry
	}
	m := x.Matches[0]
	if m.Matched {
		return fmt.Sprintf("%sentry %s matches, but %s", why, m.Entry.GetId(), m.Reason), more
	}
	missing := make([]string, len(m.Missing))
	for i, s := range m.Missing {
		missing[i] = s.Type + ":" + s.Value
	}
	return fmt.Sprintf("%sno entry matches; nearest is %s, for which it lacks %s", why, m.Entry.GetSpiffeId(), strings.Join(missing, ", ")), more + entry
}
