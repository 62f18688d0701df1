package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/config"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// defaultRotateWait is how long a rotation waits for connected agents.
const defaultRotateWait = 30 * time.Second

func (a *app) authorityCommand() *cobra.Command {
	return noun("authority", "see and rotate the keys that sign",
		"An authority is a signing key of the trust domain. It is prepared (published, so that\n"+
			"everyone can verify what it will sign), then active (it signs), then old (what it\n"+
			"signed is still valid).",
		"  hallmark authority list\n  hallmark authority rotate x509",
		a.authorityList(), a.authorityRotate())
}

// authorityItem is an authority as commands print it.
type authorityItem struct {
	ID          string     `json:"id"`
	Kind        string     `json:"kind"`  // x509 or jwt
	State       string     `json:"state"` // prepared, active or old
	Server      string     `json:"server"`
	CreatedAt   *time.Time `json:"created_at"`
	ActivatedAt *time.Time `json:"activated_at"`
	ExpiresAt   *time.Time `json:"expires_at"`
	Tainted     bool       `json:"tainted"`
}

func authorityOf(x *hallmarkv1.Authority) authorityItem {
	return authorityItem{
		ID:     x.GetId(),
		Kind:   strings.ToLower(strings.TrimPrefix(x.GetKind().String(), "KIND_")),
		State:  strings.ToLower(strings.TrimPrefix(x.GetState().String(), "STATE_")),
		Server: x.GetServer(), CreatedAt: timestamp(x.GetCreatedAt()), ActivatedAt: timestamp(x.GetActivatedAt()),
		ExpiresAt: timestamp(x.GetExpiresAt()), Tainted: x.GetTainted(),
	}
}

func (a *app) authorityList() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "list the authorities of all servers",
		Long:    "List prints the authorities of every server of the trust domain, with their states.",
		Example: "  hallmark authority list\n  hallmark authority list -o json",
		Args:    noArguments,
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.server().ListAuthorities(ctx, &hallmarkv1.ListAuthoritiesRequest{})
		if err != nil {
			return rpcError("list authorities", err)
		}
		items := make([]authorityItem, len(resp.Authorities))
		for i, x := range resp.Authorities {
			items[i] = authorityOf(x)
		}
		return a.print(items, func(w io.Writer) {
			t := table{style: a.style, header: []string{"KIND", "STATE", "ID", "SERVER", "EXPIRES", ""}}
			for _, x := range items {
				paint := a.style.dim
				switch x.State {
				case "active":
					paint = a.style.green
				case "prepared":
					paint = a.style.cyan
				}
				mark := cell{}
				if x.Tainted {
					mark = painted(a.style.yellow, "tainted")
				}
				t.add(text(x.Kind), painted(paint, x.State), text(x.ID), text(x.Server), text(a.momentOf(x.ExpiresAt)), mark)
			}
			io.WriteString(w, t.String())
		})
	}
	return cmd
}

// rotationItem is the outcome of a rotation as commands print it.
type rotationItem struct {
	Activated authorityItem `json:"activated"`
	Agents    int32         `json:"agents"` // that had acknowledged it before it signed
}

func (a *app) authorityRotate() *cobra.Command {
	wait := duration{config.Duration(defaultRotateWait)}
	cmd := &cobra.Command{
		Use:   "rotate x509|jwt",
		Short: "sign with a new key from now on",
		Long: "Rotate prepares a new authority, publishes it, waits until every connected agent has\n" +
			"it, and lets it sign. What the old one signed stays valid. If an agent does not\n" +
			"acknowledge in time, the new authority stays prepared and nothing else changes.",
		Example:   "  hallmark authority rotate x509\n  hallmark authority rotate jwt --wait 2m",
		Args:      arguments(1, 1, "x509 or jwt"),
		ValidArgs: []string{"x509", "jwt"},
	}
	cmd.Flags().Var(&wait, "wait", "how `long` to wait for connected agents")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, err := authorityKind(args[0])
		if err != nil {
			return err
		}
		seconds, err := wait.seconds("--wait")
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Duration(seconds)*time.Second+callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.server().RotateAuthority(ctx, &hallmarkv1.RotateAuthorityRequest{Kind: kind, Wait: seconds})
		if err != nil {
			return rpcError("rotate the "+args[0]+" authority", err)
		}
		item := rotationItem{authorityOf(resp.Activated), resp.Agents}
		return a.print(item, func(w io.Writer) {
			fmt.Fprintf(w, "%s signs now; %s had it before.\n", a.style.bold(printable(item.Activated.ID)), count(int(item.Agents), "connected agent", "connected agents"))
		})
	}
	return cmd
}

func authorityKind(name string) (hallmarkv1.Authority_Kind, error) {
	switch name {
	case "x509":
		return hallmarkv1.Authority_KIND_X509, nil
	case "jwt":
		return hallmarkv1.Authority_KIND_JWT, nil
	}
	return 0, usageError(fmt.Errorf("%q is no kind of authority; it is x509 or jwt", name))
}
