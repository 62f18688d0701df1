package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

func (a *app) issuerCommand() *cobra.Command {
	return noun("issuer", "see what outside issuers' tokens may have",
		"An issuer is an OpenID Connect provider, or another trust domain, whose tokens the\n"+
			"server exchanges for SVIDs (token_exchange in its configuration). Entries whose parent\n"+
			"ID is /hallmark/issuer/NAME say which tokens may have which identity.",
		"  hallmark issuer test --token job.token\n  hallmark issuer lint",
		a.issuerTest(), a.issuerLint())
}

// tokenExplanation is what would become of a token, as it is printed.
type tokenExplanation struct {
	Issuer    string           `json:"issuer"` // empty: of none that is trusted
	ParentID  string           `json:"parent_id"`
	Accepted  bool             `json:"accepted"`
	Checks    []tokenCheckItem `json:"checks"`
	Selectors []string         `json:"selectors"`
	Entries   []tokenMatchItem `json:"entries"` // the nearest first
	Total     int32            `json:"total"`   // entries of the issuer
}

type tokenCheckItem struct {
	Name    string `json:"name"`
	Passed  bool   `json:"passed"`
	Failure string `json:"failure,omitempty"`
}

type tokenMatchItem struct {
	EntryID   string   `json:"entry_id"`
	SPIFFEID  string   `json:"spiffe_id"`
	Matched   bool     `json:"matched"`
	Expired   bool     `json:"expired"`
	Selectors []string `json:"selectors"`
	Missing   []string `json:"missing"`
}

func (a *app) issuerTest() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "test",
		Short: "say what would become of a token",
		Long: "Test has the server check a token as its token endpoint does, and shows each check with\n" +
			"its result, the selectors of the claims, and which entries the token matches or lacks\n" +
			"something for. The token is not used up. Its exit status is 0 if the token would be\n" +
			"exchanged for an SVID.",
		Example: "  hallmark issuer test --token job.token\n  printenv CI_TOKEN | hallmark issuer test --token - -o json",
		Args:    noArguments,
	}
	cmd.Flags().StringVar(&file, "token", "", "`file` of the token, or - for the standard input")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := required(cmd, "token"); err != nil {
			return err
		}
		token, err := a.readToken(file)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.server().ExplainToken(ctx, &hallmarkv1.ExplainTokenRequest{Token: token})
		if err != nil {
			return rpcError("test the token", err)
		}
		x := tokenExplanationOf(resp)
		if err := a.print(x, func(w io.Writer) { a.showTokenExplanation(w, x) }); err != nil {
			return err
		}
		for _, e := range x.Entries {
			if x.Accepted && e.Matched {
				return nil
			}
		}
		return statusError(exitFailed)
	}
	return cmd
}

// readToken reads a token from a file, or from the standard input if that is -.
func (a *app) readToken(file string) (string, error) {
	in := a.in
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", fmt.Errorf("read the token: %w", err)
		}
		defer f.Close()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, maxToken+1))
	if err != nil || len(text) > maxToken {
		return "", fmt.Errorf("%s cannot be read, or is longer than a token", file)
	}
	token := strings.TrimSpace(string(text))
	if token == "" {
		return "", errors.New("there is no token in " + file)
	}
	return token, nil
}

func tokenExplanationOf(r *hallmarkv1.ExplainTokenResponse) *tokenExplanation {
	x := &tokenExplanation{
		Issuer: r.Issuer, ParentID: r.ParentId, Accepted: r.Accepted, Checks: []tokenCheckItem{},
		Selectors: recordTexts(r.Selectors), Entries: []tokenMatchItem{}, Total: r.Total,
	}
	for _, c := range r.Checks {
		x.Checks = append(x.Checks, tokenCheckItem{c.Name, c.Failure == "", c.Failure})
	}
	for _, m := range r.Matches {
		x.Entries = append(x.Entries, tokenMatchItem{
			EntryID: m.GetEntry().GetId(), SPIFFEID: m.GetEntry().GetSpiffeId(), Matched: m.Matched, Expired: m.Expired,
			Selectors: recordTexts(m.GetEntry().GetSelectors()), Missing: recordTexts(m.Missing),
		})
	}
	return x
}

func (a *app) showTokenExplanation(w io.Writer, x *tokenExplanation) {
	s := a.style
	mark := func(good bool) string {
		if good {
			return s.green("✓")
		}
		return s.red("✗")
	}
	if x.Issuer != "" {
		fmt.Fprintf(w, "%s  issuer %s\n", s.bold("The token"), printable(x.Issuer))
	} else {
		fmt.Fprintln(w, s.bold("The token"))
	}
	for _, c := range x.Checks {
		line := mark(c.Passed) + " " + printable(c.Name)
		if c.Failure != "" {
			line += ": " + printable(c.Failure)
		}
		fmt.Fprintln(w, "  "+line)
	}
	if len(x.Selectors) > 0 {
		title := "What it proves"
		if !x.Accepted {
			title = "What it says, and does not prove"
		}
		fmt.Fprintf(w, "\n%s\n", s.bold(title))
		for _, v := range x.Selectors {
			fmt.Fprintln(w, "  "+printable(v))
		}
	}
	if x.ParentID == "" {
		return
	}
	matched := 0
	for _, e := range x.Entries {
		if e.Matched {
			matched++
		}
	}
	fmt.Fprintf(w, "\n%s  %d of %s below %s match\n", s.bold("What it may be"), matched, count(int(x.Total), "entry", "entries"), printable(x.ParentID))
	for _, e := range x.Entries {
		fmt.Fprintf(w, "\n  %s %s  %s\n", mark(e.Matched), printable(e.SPIFFEID), s.dim(printable(e.EntryID)))
		if e.Expired {
			fmt.Fprintln(w, "    └ "+s.red("✗")+" the entry has expired")
		}
		for _, m := range e.Missing {
			fmt.Fprintln(w, "    └ "+s.red("✗")+" "+printable(m))
		}
	}
	if x.Total == 0 {
		fmt.Fprintf(w, "\n  Make one: %s\n", s.bold("hallmark entry create --spiffe-id /job --parent-id "+printable(x.ParentID)+" --selector …"))
	}
}

// findingItem is a finding as it is printed.
type findingItem struct {
	Issuer   string `json:"issuer"`
	EntryID  string `json:"entry_id,omitempty"`
	SPIFFEID string `json:"spiffe_id,omitempty"`
	Finding  string `json:"finding"`
	Remedy   string `json:"remedy"`
}

func (a *app) issuerLint() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lint",
		Short: "look for what lets in more than is meant",
		Long: "Lint looks at the configured issuers and at the entries for their tokens: names that\n" +
			"another can have one day where there are IDs that stay, conditions and entries that fit\n" +
			"more tokens than is meant, tokens that are for others too. Its exit status is 1 if it\n" +
			"finds something. That it finds nothing is no proof.",
		Example: "  hallmark issuer lint\n  hallmark issuer lint -o json",
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
		resp, err := c.server().LintIssuers(ctx, &hallmarkv1.LintIssuersRequest{})
		if err != nil {
			return rpcError("look at the issuers", err)
		}
		items := []findingItem{}
		for _, f := range resp.Findings {
			items = append(items, findingItem{f.Issuer, f.EntryId, f.SpiffeId, f.Says, f.Remedy})
		}
		if err := a.print(items, func(w io.Writer) { a.showFindings(w, items, int(resp.Total)) }); err != nil {
			return err
		}
		if len(items) > 0 {
			return statusError(exitFailed)
		}
		return nil
	}
	return cmd
}

func (a *app) showFindings(w io.Writer, items []findingItem, total int) {
	if len(items) == 0 {
		fmt.Fprintln(w, "Nothing was found.")
		return
	}
	for _, f := range items {
		where := "issuer " + printable(f.Issuer)
		if f.EntryID != "" {
			where += ", entry " + printable(f.EntryID) + " for " + printable(f.SPIFFEID)
		}
		fmt.Fprintf(w, "%s %s\n    %s\n    └ %s\n", a.style.yellow("!"), where, printable(f.Finding), printable(f.Remedy))
	}
	if total > len(items) {
		fmt.Fprintf(w, "and %s more\n", thousands(total-len(items)))
	}
}
