package cli

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// reasons are those for which an SVID is revoked for good, as RFC 5280 §5.3.1
// writes and numbers them.
var reasons = map[string]int32{
	"unspecified": 0, "keyCompromise": 1, "cACompromise": 2, "affiliationChanged": 3, "superseded": 4,
	"cessationOfOperation": 5, "privilegeWithdrawn": 9, "aACompromise": 10,
}

func reasonName(n int32) string {
	for name, number := range reasons {
		if number == n {
			return name
		}
	}
	return fmt.Sprint(n)
}

// revokeMargin is how much longer than the server waits for its answer.
const revokeMargin = 10 * time.Second

func (a *app) svidRevoke() *cobra.Command {
	var serial, authority, id, node, reason string
	var wait duration
	cmd := &cobra.Command{
		Use:   "revoke [CERTIFICATE.pem...]",
		Short: "take X509-SVIDs back before their end",
		Long: "Revoke puts X509-SVIDs on the CRL of the authority that signed them, on whichever server\n" +
			"that is, and waits until all have it: from then on peers that honour CRLs refuse them.\n" +
			"Agents replace a revoked SVID of a workload that is still entitled to one at once, with\n" +
			"another key; delete the entry of one that is not to have any. An agent whose SVID is\n" +
			"revoked has to attest again.\n\n" +
			"What is revoked: the certificate of a PEM file; a serial number; all that was issued of an\n" +
			"identity until now; or an agent's SVID and all that was issued through it until now.\n\n" +
			"The exit status is 1 if an authority's CRL does not have all of it: its server is away, or\n" +
			"its key is gone. What was revoked stays so, and is put on the CRL when the server is back.",
		Example: "  hallmark svid revoke leaked.pem --reason keyCompromise\n  hallmark svid revoke --serial 5847273541\n" +
			"  hallmark svid revoke --spiffe-id /web\n  hallmark svid revoke --node join_token/4f1c -o json",
		Args: arguments(0, -1, "a file"),
	}
	cmd.Flags().StringVar(&serial, "serial", "", "serial `number`, decimal, or hexadecimal after 0x")
	cmd.Flags().StringVar(&authority, "authority", "", "with --serial: `ID` of the authority, if another server issued it")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "all of this identity: `SPIFFE-ID` or just /PATH")
	cmd.Flags().StringVar(&node, "node", "", "this `AGENT`'s SVID, and all that was issued through it")
	cmd.Flags().StringVar(&reason, "reason", "unspecified", "`reason` in the CRL: unspecified, keyCompromise, affiliationChanged, superseded,\ncessationOfOperation or privilegeWithdrawn")
	cmd.Flags().Var(&wait, "wait", "`time` to wait for CRLs and agents (default 10s)")
	socket := socketFlag(cmd, serverSocket)
	yes := yesFlag(cmd)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		number, ok := reasons[reason]
		if !ok {
			return usageError(fmt.Errorf("--reason %q is none; it is one of unspecified, keyCompromise, affiliationChanged, superseded, cessationOfOperation, privilegeWithdrawn", reason))
		}
		seconds, err := wait.seconds("--wait")
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout+time.Duration(seconds)*time.Second+revokeMargin)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		var what []string
		req := &hallmarkv1.RevokeSVIDsRequest{Wait: seconds}
		add := func(text string, r *hallmarkv1.Revocation) {
			r.Reason = number
			what, req.Revocations = append(what, text), append(req.Revocations, r)
		}
		for _, file := range args {
			cert, err := certificateOf(file)
			if err != nil {
				return err
			}
			if len(cert.AuthorityKeyId) == 0 {
				return fmt.Errorf("%s: the certificate does not say which authority signed it", file)
			}
			add(fmt.Sprintf("the certificate in %s, serial number %v", file, cert.SerialNumber),
				&hallmarkv1.Revocation{SerialNumber: cert.SerialNumber.Bytes(), AuthorityId: hex.EncodeToString(cert.AuthorityKeyId)})
		}
		if serial != "" {
			n, ok := new(big.Int).SetString(serial, 0)
			if !ok || n.Sign() <= 0 || n.BitLen() > 160 {
				return usageError(fmt.Errorf("--serial %q is no serial number; write it in decimal, or in hexadecimal after 0x", serial))
			}
			add("serial number "+n.String(), &hallmarkv1.Revocation{SerialNumber: n.Bytes(), AuthorityId: strings.ToLower(authority)})
		} else if authority != "" {
			return usageError(errors.New("--authority goes with --serial"))
		}
		if id != "" {
			of, err := c.id(ctx, "--spiffe-id", id)
			if err != nil {
				return err
			}
			add("all SVIDs of "+idText(of)+" until now", &hallmarkv1.Revocation{SpiffeId: idText(of)})
		}
		if node != "" {
			of, err := c.node(ctx, node)
			if err != nil {
				return err
			}
			add("the SVID of "+idText(of)+" and all issued through it until now; the agent has to attest again", &hallmarkv1.Revocation{NodeId: idText(of)})
		}
		if len(what) == 0 {
			return usageError(errors.New("nothing to revoke was named: give a certificate's file, --serial, --spiffe-id or --node"))
		}
		if err := a.confirm(*yes, false, "This will revoke:\n"+indent(strings.Join(what, "\n"), "  ")+"\nIt cannot be undone."); err != nil {
			return err
		}
		return a.revoke(ctx, c, req)
	}
	return cmd
}

// certificateOf reads the first certificate of a PEM file.
func certificateOf(file string) (*x509.Certificate, error) {
	const most = 1 << 20
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return nil, err
	}
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, fmt.Errorf("%s has no certificate in PEM (-----BEGIN CERTIFICATE-----)", file)
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		return cert, nil
	}
}

// revokedItem is what came of a revocation, as commands print it.
type revokedItem struct {
	Revision            int64          `json:"revision"`
	Covered             bool           `json:"covered"` // by the CRLs of all authorities that it concerns
	Authorities         []coverageItem `json:"authorities"`
	Agents              int32          `json:"agents"`         // of this server that have the CRLs
	AgentsMissing       bool           `json:"agents_missing"` // others did not acknowledge in time
	ElapsedMicroseconds int64          `json:"elapsed_microseconds"`
}

// coverageItem is how far the CRL of an authority is.
type coverageItem struct {
	AuthorityID string `json:"authority_id"`
	Server      string `json:"server"`
	Covered     bool   `json:"covered"`
	CRLNumber   uint64 `json:"crl_number,omitempty"`
	Revoked     int32  `json:"revoked"` // certificates in its CRL
}

func coverageOf(all []*hallmarkv1.RevocationCoverage) []coverageItem {
	items := make([]coverageItem, len(all))
	for i, c := range all {
		items[i] = coverageItem{c.AuthorityId, c.Server, c.Covered, c.CrlNumber, c.Revoked}
	}
	return items
}

func (a *app) coverageTable(items []coverageItem) string {
	t := table{style: a.style, header: []string{"AUTHORITY", "SERVER", "REVOKED", "CRL"}}
	for _, x := range items {
		paint, state := a.style.green, "has all of it"
		if !x.Covered {
			paint, state = a.style.red, "lacks some of it"
		}
		t.add(text(x.AuthorityID), text(x.Server), text(fmt.Sprint(x.Revoked)), painted(paint, state))
	}
	return t.String()
}

// revoke makes the call and prints what came of it.
func (a *app) revoke(ctx context.Context, c *admin, req *hallmarkv1.RevokeSVIDsRequest) error {
	resp, err := c.server().RevokeSVIDs(ctx, req)
	if err != nil {
		return rpcError("revoke", err)
	}
	item := revokedItem{
		Revision: resp.Revision, Covered: true, Authorities: coverageOf(resp.Authorities),
		Agents: resp.Agents, AgentsMissing: resp.AgentsMissing, ElapsedMicroseconds: resp.ElapsedMicroseconds,
	}
	for _, x := range item.Authorities {
		item.Covered = item.Covered && x.Covered
	}
	err = a.print(item, func(w io.Writer) {
		fmt.Fprintf(w, "revoked; %s of this server %s the CRLs, after %v\n", count(int(item.Agents), "agent", "agents"),
			map[bool]string{true: "has", false: "have"}[item.Agents == 1], (time.Duration(item.ElapsedMicroseconds) * time.Microsecond).Round(time.Millisecond))
		io.WriteString(w, a.coverageTable(item.Authorities))
	})
	if err != nil {
		return err
	}
	if !item.Covered {
		return &failure{code: exitFailed, err: errors.New("not all CRLs have it yet"),
			remedy: "Start the servers that are away. If one is gone for good, or its key is, taint and\nrevoke its authority: hallmark authority taint x509 ID, hallmark authority revoke x509 ID."}
	}
	if item.AgentsMissing {
		return &failure{code: exitFailed, err: errors.New("not all agents have acknowledged the CRLs"), remedy: "\"hallmark node list\" shows how far each is; they get them once they are connected."}
	}
	return nil
}

// issuedItem is an SVID that was issued, as commands print it.
type issuedItem struct {
	SPIFFEID     string     `json:"spiffe_id"`
	SerialNumber string     `json:"serial_number"`
	State        string     `json:"state"` // valid or revoked
	IssuedAt     *time.Time `json:"issued_at"`
	ExpiresAt    *time.Time `json:"expires_at"`
	Node         string     `json:"node,omitempty"` // the agent that asked for it
	AuthorityID  string     `json:"authority_id"`
}

func issuedOf(all []*hallmarkv1.IssuedSVID) []issuedItem {
	items := make([]issuedItem, len(all))
	for i, s := range all {
		items[i] = issuedItem{s.SpiffeId, s.SerialNumber, "valid", timestamp(s.IssuedAt), timestamp(s.ExpiresAt), s.NodeId, s.AuthorityId}
		if s.Revoked {
			items[i].State = "revoked"
		}
	}
	return items
}

func (a *app) paintSVID(state string) func(string) string {
	if state == "revoked" {
		return a.style.red
	}
	return a.style.green
}

func (a *app) svidList() *cobra.Command {
	var id, node string
	var limit int32
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list what this server issued that has not ended",
		Long: "List prints the X509-SVIDs and other certificates that this server has issued and that have\n" +
			"not ended, the newest first. Each server of a cluster lists its own.",
		Example: "  hallmark svid list\n  hallmark svid list --spiffe-id /web\n  hallmark svid list --node join_token/4f1c -o json",
		Args:    noArguments,
	}
	cmd.Flags().StringVar(&id, "spiffe-id", "", "only of this identity: `SPIFFE-ID` or just /PATH")
	cmd.Flags().StringVar(&node, "node", "", "only of this `AGENT` and through it")
	cmd.Flags().Int32Var(&limit, "limit", 1000, "at most so many, up to 10000")
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
		req := &hallmarkv1.ListSVIDsRequest{Limit: limit}
		if id != "" {
			of, err := c.id(ctx, "--spiffe-id", id)
			if err != nil {
				return err
			}
			req.SpiffeId = idText(of)
		}
		if node != "" {
			of, err := c.node(ctx, node)
			if err != nil {
				return err
			}
			req.NodeId = idText(of)
		}
		resp, err := c.server().ListSVIDs(ctx, req)
		if err != nil {
			return rpcError("list SVIDs", err)
		}
		items := issuedOf(resp.Svids)
		if len(items) == 0 && a.output == outputTable {
			a.remark("This server has issued none that has not ended.")
			return nil
		}
		return a.print(items, func(w io.Writer) {
			t := table{style: a.style, header: []string{"SPIFFE ID", "SERIAL", "STATE", "EXPIRES", "THROUGH"}}
			for _, x := range items {
				t.add(painted(a.style.bold, x.SPIFFEID), text(x.SerialNumber), painted(a.paintSVID(x.State), x.State),
					text(a.relative(*x.ExpiresAt)), text(x.Node))
			}
			io.WriteString(w, t.String())
			if resp.Total > int64(len(items)) {
				a.remark("%d more; --limit shows them, --spiffe-id and --node fewer.", resp.Total-int64(len(items)))
			}
		})
	}
	return cmd
}

func (a *app) svidShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show SERIAL",
		Short:   "show what this server issued under a serial number",
		Long:    "Show prints whose a serial number is, decimal or in hexadecimal after 0x, and whether it is\nrevoked. Only the server that issued it knows.",
		Example: "  hallmark svid show 584727354153173098993893961261101180718031227294\n  hallmark svid show 0x66bf5a0e2b -o json",
		Args:    arguments(1, 1, "a serial number"),
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		n, ok := new(big.Int).SetString(args[0], 0)
		if !ok {
			return usageError(fmt.Errorf("%q is no serial number", args[0]))
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.server().ListSVIDs(ctx, &hallmarkv1.ListSVIDsRequest{SerialNumber: n.String()})
		if err != nil {
			return rpcError("show the SVID", err)
		}
		if len(resp.Svids) == 0 {
			return &failure{code: exitNotFound, err: fmt.Errorf("this server has issued no SVID with serial number %v that has not ended", n),
				remedy: "Each server knows its own; \"hallmark cluster list\" shows the others."}
		}
		item := issuedOf(resp.Svids)[0]
		return a.print(item, func(w io.Writer) {
			d := details{style: a.style}
			d.addPainted("SPIFFE ID", a.style.bold, item.SPIFFEID)
			d.addPainted("State", a.paintSVID(item.State), item.State)
			d.add("Serial number", item.SerialNumber)
			d.add("Issued", a.moment(*item.IssuedAt))
			d.add("Expires", a.moment(*item.ExpiresAt))
			d.add("Through", item.Node)
			d.add("Authority", item.AuthorityID)
			io.WriteString(w, d.String())
		})
	}
	return cmd
}

// revocationItem is a revocation, as commands print it.
type revocationItem struct {
	Kind         string     `json:"kind"` // certificate, identity or node
	SerialNumber string     `json:"serial_number,omitempty"`
	AuthorityID  string     `json:"authority_id,omitempty"`
	SPIFFEID     string     `json:"spiffe_id,omitempty"` // of the identity or the node
	Reason       string     `json:"reason"`
	RevokedAt    *time.Time `json:"revoked_at"`
	EndsAt       *time.Time `json:"ends_at"` // when all that it is about has ended, and it is forgotten
}

func (a *app) svidRevocations() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "revocations",
		Short: "list what is revoked, and the CRLs that have it",
		Long: "Revocations prints what was revoked and has not ended, on any server, the newest first, and\n" +
			"for each X.509 authority whether its CRL has all that concerns it.",
		Example: "  hallmark svid revocations\n  hallmark svid revocations -o json | jq '.authorities[] | select(.covered | not)'",
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
		resp, err := c.server().ListRevocations(ctx, &hallmarkv1.ListRevocationsRequest{})
		if err != nil {
			return rpcError("list revocations", err)
		}
		var out struct {
			Revocations []revocationItem `json:"revocations"`
			Authorities []coverageItem   `json:"authorities"`
		}
		out.Revocations = make([]revocationItem, 0, len(resp.Revocations))
		for _, r := range resp.Revocations {
			x := revocationItem{Kind: "identity", SPIFFEID: r.SpiffeId, Reason: reasonName(r.Reason), RevokedAt: timestamp(r.RevokedAt), EndsAt: timestamp(r.EndsAt)}
			switch {
			case len(r.SerialNumber) > 0:
				x.Kind, x.SerialNumber, x.AuthorityID = "certificate", new(big.Int).SetBytes(r.SerialNumber).String(), r.AuthorityId
			case r.NodeId != "":
				x.Kind, x.SPIFFEID = "node", r.NodeId
			}
			out.Revocations = append(out.Revocations, x)
		}
		out.Authorities = coverageOf(resp.Authorities)
		return a.print(out, func(w io.Writer) {
			if len(out.Revocations) == 0 {
				a.remark("Nothing is revoked.")
				return
			}
			t := table{style: a.style, header: []string{"WHAT", "OF", "REASON", "REVOKED", "UNTIL"}}
			for _, x := range out.Revocations {
				t.add(text(x.Kind), painted(a.style.bold, x.SPIFFEID+x.SerialNumber), text(x.Reason), text(x.RevokedAt.UTC().Format(time.RFC3339)), text(a.relative(*x.EndsAt)))
			}
			io.WriteString(w, t.String()+"\n"+a.coverageTable(out.Authorities))
		})
	}
	return cmd
}
