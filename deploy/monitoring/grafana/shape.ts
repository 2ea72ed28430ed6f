// What Grafana's own schema allows in dashboard.json, with the options of the
// kinds of panels that are in it. check.sh compiles the dashboard against this.
import type { Dashboard, DataSourceRef, OptionsWithLegend, OptionsWithTooltip, Panel, RowPanel, SingleStatBaseOptions, VariableModel } from '@grafana/schema';

// Plain is T as JSON has it: members of enumerations are their values.
type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;

type Target = { refId: string; expr: string; legendFormat?: string; instant?: boolean; datasource: DataSourceRef };
type Kind<Name extends string, Options> = Plain<Omit<Panel, 'type' | 'options' | 'targets'>> & { type: Name; options: Plain<Options>; targets: Target[] };
type AnyPanel = Kind<'stat' | 'gauge', Partial<SingleStatBaseOptions>> | Kind<'timeseries', OptionsWithLegend & OptionsWithTooltip> | Plain<RowPanel>;

// The schema does not know definition, which Grafana shows in its list of variables.
type Variable = Plain<VariableModel> & { definition?: string };

export type OurDashboard = Omit<Plain<Dashboard>, 'panels' | 'templating'> & { panels: AnyPanel[]; templating: { list: Variable[] } };
