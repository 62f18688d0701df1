package doctor

import (
	"cmp"
	"context"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/version"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// Modes of the sockets: admin sockets are the program's own user's, the Workload
// API everybody's.
const (
	adminMode    = 0o600
	workloadMode = 0o777
)

// dialSocket makes a client of a Unix socket.
func dialSocket(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the kernel says who is at the other end
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
}

// maxMessage is the size of an answer, in bytes: a page of agents can be large.
const maxMessage = 64 << 20

// words is what went wrong in a call, without gRPC's decoration.
func words(err error) string {
	switch s, ok := status.FromError(err); {
	case !ok:
		return err.Error()
	case s.Code() == codes.DeadlineExceeded:
		return "no answer in time"
	default:
		return s.Message()
	}
}

// agent asks the agent how it is, and dials its server.
func (d *examination) agent(ctx context.Context, p *part) {
	s := d.agentStatus(ctx, p)
	to := peer{
		address: d.Agent.Layout.Server, authorities: d.Agent.Layout.Authorities, trustedBy: "what the agent is configured to trust",
		remedy: "Give the agent this trust domain's bundle (\"hallmark bundle show\" on the server, as trust_bundle), or a new join string (\"hallmark token generate\").",
	}
	trustDomain := d.Agent.Layout.TrustDomain
	if s != nil {
		to.address, trustDomain = s.Server, cmp.Or(s.TrustDomain, trustDomain)
		if len(s.Authorities) > 0 {
			to.authorities, to.trustedBy = parse(s.Authorities), "the bundle that the agent holds"
			to.remedy = "If the server is the right one, all its authorities were replaced while the agent was away: give the agent a new join string (\"hallmark token generate\")."
		}
	}
	if to.address == "" {
		return // nobody says where the server is
	}
	var err error
	if to.trustDomain, err = spiffeid.TrustDomainFromString(trustDomain); err != nil {
		p.fail("server certificate", "", "the agent's trust domain: %v", err)
		return
	}
	d.dial(ctx, p, to)
}

func parse(ders [][]byte) (out []*x509.Certificate) {
	for _, der := range ders {
		if cert, err := x509.ParseCertificate(der); err == nil {
			out = append(out, cert)
		}
	}
	return out
}

// agentStatus asks the agent how it is. It returns nil if that cannot be known.
func (d *examination) agentStatus(ctx context.Context, p *part) *hallmarkv1.GetStatusResponse {
	cred, ok := p.socket(ctx, "agent", d.Agent.Socket, adminMode)
	if !ok {
		return nil
	}
	p.descriptors(d.Agent, cred)
	conn, err := dialSocket(d.Agent.Socket)
	if err != nil {
		p.fail("status", "", "%v", err)
		return nil
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s, err := hallmarkv1.NewAgentAdminServiceClient(conn).GetStatus(ctx, &hallmarkv1.GetStatusRequest{})
	if err != nil {
		p.fail("status", "See the agent's log.", "the agent does not say how it is: %s", words(err))
		return nil
	}
	const rejoin = "If it does not come back by itself, start it with a new join string (\"hallmark token generate\")."
	end := time.Unix(s.SvidExpiresAt, 0)
	switch {
	case s.AgentId == "":
		p.fail("identity", "See the agent's log for why; a join token works once, \"hallmark token generate\" makes a new one.", "the agent is not attested%s", because(s.LastError))
	case s.SvidExpiresAt == 0 || !d.Now().Before(end):
		p.fail("identity", rejoin, "the SVID of %s %s", s.AgentId, d.until(end))
	case !s.Connected:
		p.warn("identity", "Bring it back in step before that: then it is too late for one that joined with a token.", "the SVID of %s %s", s.AgentId, d.until(end))
	default:
		p.ok("identity", "%s, whose SVID %s and renews itself", s.AgentId, d.until(end))
	}
	if s.Connected {
		p.ok("in step", "with %s at revision %d: %d entries, %d X509-SVIDs held", s.Server, s.Revision, s.Entries, s.Svids)
	} else {
		p.fail("in step", "What follows says how far it gets; the agent's log says more.", "the agent is not in step with %s%s; it serves what it holds (%d X509-SVIDs)", s.Server, because(s.LastError), s.Svids)
	}
	p.version("agent", s.Version)
	return s
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + reason
}

// version compares a running program to this one.
func (p *part) version(program, running string) {
	if own := version.String(); own != running {
		p.warn("version", "Start the "+program+" again if it was replaced, or use its own binary.", "the %s is of version %s, this command of %s", program, running, own)
		return
	}
	p.ok("version", "%s", running)
}
