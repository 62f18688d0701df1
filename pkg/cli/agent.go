package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/conf/schema"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/join"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

func (a *app) agentCommand() *cobra.Command {
	return noun("agent", "run and look after the agent of a node",
		"An agent runs on each node: it attests the node and the processes on it, and hands\n"+
			"out their identities over the Workload API.",
		"  hallmark agent run --join STRING\n  hallmark agent health",
		a.agentRun(), a.agentValidate(), a.schemaCommand("agent", schema.Agent), a.agentHealth())
}

func (a *app) agentFlags(cmd *cobra.Command) *configFlags {
	f := &configFlags{}
	f.register(cmd, "agent")
	f.key(cmd, "join", "join", "`STRING` that \"hallmark token generate\" printed; - reads it from the standard input")
	f.key(cmd, "trust-domain", "trust_domain", "`name` of the trust domain (default that of the join string)")
	f.key(cmd, "server", "server", "`HOST:PORT` of the server (default that of the join string)")
	f.key(cmd, "trust-bundle", "trust_bundle", "`FILE` with the server's bundle, to trust it without a join string")
	f.key(cmd, "data-dir", "data_dir", "`DIR` of the agent's own identity")
	f.key(cmd, "socket", "socket", "`PATH` of the Workload API's socket")
	f.key(cmd, "admin-socket", "admin_socket", "`PATH` of the socket for administration")
	f.key(cmd, "log-level", "log.level", "`level`: debug, info, warn or error")
	f.key(cmd, "log-format", "log.format", "`format`: text or json")
	return f
}

// agentSource is the agent's configuration, with a join string from the
// standard input if the flags say so.
func (a *app) agentSource(cmd *cobra.Command, f *configFlags) (config.Source, error) {
	src, err := f.source(cmd)
	if err != nil {
		return src, err
	}
	for i, s := range src.Set {
		if s.Path != "join" {
			continue
		}
		if s.Value == "-" {
			text, err := io.ReadAll(io.LimitReader(a.in, join.MaxLength+64))
			if err != nil {
				return src, fmt.Errorf("read the join string: %w", err)
			}
			src.Set[i].Value = strings.TrimSpace(string(text))
		}
		// What was pasted is checked here, before anything starts.
		if _, err := join.Parse(src.Set[i].Value); err != nil {
			return src, usageError(fmt.Errorf("%s: %w", s.From, err))
		}
	}
	return src, nil
}

func (a *app) agentRun() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "run an agent until it is told to stop",
		Long: "Run starts an agent and logs to the standard error until it is interrupted. With a\n" +
			"join string it needs nothing else. What the flags say overrides the configuration\n" +
			"file. An agent that has an identity from an earlier run uses that. SIGHUP has it\n" +
			"read the file again and take over log.level and limits; other keys need a restart.",
		Example: "  hallmark agent run --join \"$(ssh ca hallmark token generate)\"\n  hallmark agent run -c /etc/hallmark/agent.yaml",
		Args:    noArguments,
	}
	f := a.agentFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		src, err := a.agentSource(cmd, f)
		if err != nil {
			return err
		}
		defer reloadOnHangup(&src)()
		return ended(cmd.Context(), a.programs.RunAgent(cmd.Context(), src, func() {}))
	}
	return cmd
}

func (a *app) agentValidate() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "validate",
		Short:   "check an agent's configuration",
		Long:    "Validate says what is wrong with an agent's configuration, and where. It starts nothing.",
		Example: "  hallmark agent validate -c /etc/hallmark/agent.yaml",
		Args:    noArguments,
	}
	f := a.agentFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		src, err := a.agentSource(cmd, f)
		if err != nil {
			return err
		}
		return a.validateConfig(src, a.programs.CheckAgent)
	}
	return cmd
}

// agentStatus is what `agent health` prints.
type agentStatus struct {
	Connected     bool       `json:"connected"` // the push stream is open and in step
	AgentID       string     `json:"agent_id"`
	TrustDomain   string     `json:"trust_domain"`
	Server        string     `json:"server"`
	Version       string     `json:"version"`
	Revision      int64      `json:"revision"`
	SVIDExpiresAt *time.Time `json:"svid_expires_at"`
	Entries       int32      `json:"entries"`
	SVIDs         int32      `json:"svids"`
	LastError     string     `json:"last_error"`
	StartedAt     *time.Time `json:"started_at"`
}

func (a *app) agentHealth() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "health",
		Short: "say whether the agent is well",
		Long: "Health asks a running agent how it is, and fails if it is not connected to the\n" +
			"server. An agent without a server still hands out what it holds.",
		Example: "  hallmark agent health\n  hallmark agent health -o json",
		Args:    noArguments,
	}
	socket := socketFlag(cmd, agentSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		conn, err := agentSocket.connect(ctx, *socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		s, err := hallmarkv1.NewAgentAdminServiceClient(conn).GetStatus(ctx, &hallmarkv1.GetStatusRequest{})
		if err != nil {
			return rpcError("ask the agent how it is", err)
		}
		item := agentStatus{
			Connected: s.Connected, AgentID: s.AgentId, TrustDomain: s.TrustDomain, Server: s.Server, Version: s.Version,
			Revision: s.Revision, SVIDExpiresAt: timestamp(s.SvidExpiresAt), Entries: s.Entries, SVIDs: s.Svids,
			LastError: s.LastError, StartedAt: timestamp(s.StartedAt),
		}
		if err := a.print(item, func(w io.Writer) { a.showStatus(w, item) }); err != nil {
			return err
		}
		if !item.Connected {
			return statusError(exitFailed)
		}
		return nil
	}
	return cmd
}

func (a *app) showStatus(w io.Writer, s agentStatus) {
	d := details{style: a.style}
	switch {
	case s.Connected:
		d.addPainted("Status", a.style.green, "connected to "+s.Server)
	case s.LastError != "":
		d.addPainted("Status", a.style.red, "not connected to "+s.Server+": "+s.LastError)
	default:
		d.addPainted("Status", a.style.yellow, "connecting to "+s.Server)
	}
	if s.AgentID == "" {
		d.addPainted("Agent", a.style.yellow, "not attested yet")
	} else {
		d.addPainted("Agent", a.style.bold, s.AgentID)
	}
	d.add("SVID expires", a.momentOf(s.SVIDExpiresAt))
	d.add("Holds", count(int(s.Entries), "entry", "entries")+", "+count(int(s.SVIDs), "X509-SVID", "X509-SVIDs"))
	d.add("Revision", fmt.Sprint(s.Revision))
	d.add("Version", s.Version)
	d.add("Started", a.momentOf(s.StartedAt))
	io.WriteString(w, d.String())
}
